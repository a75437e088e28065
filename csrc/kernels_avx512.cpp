// The kernels for AVX-512 (F, BW, VL, DQ); empty on other architectures. The instruction set is asked for here and not on the
// command line, so that nothing else in the library is compiled for it.
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,popcnt")
#endif

#include "simd_avx512.h"
//
#include "functions.h"
#include "residual.h"
#include "scans.h"
#include "strips.h"
//
#include "dots.h"
#include "selection.h"
#include "sums.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

const Kernels kernels_avx512 = {strip_stats, strip_grad, strip_select, weighted_sums, row_dots, residual, reverse_scan, lambda_errors};

#endif
