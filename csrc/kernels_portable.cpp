// The kernels for any machine.
#include "simd_portable.h"
//
#include "functions.h"
#include "residual.h"
#include "scans.h"
#include "strips.h"
//
#include "dots.h"
#include "selection.h"
#include "sums.h"

const Kernels kernels_portable = {strip_stats, strip_grad, strip_select, weighted_sums, row_dots, residual, reverse_scan, lambda_errors};
