// The kernels for any machine.
#include "simd_portable.h"
//
#include "functions.h"
#include "residual.h"
#include "scans.h"
#include "strips.h"

const Kernels kernels_portable = {strip_stats, strip_grad, residual, reverse_scan, lambda_errors};
