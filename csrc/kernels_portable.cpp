// The kernels for any machine.
#include "simd_portable.h"
//
#include "functions.h"
#include "rows.h"
#include "scans.h"

const Kernels kernels_portable = {row_stats, row_grad, residual, reverse_scan, lambda_errors};
