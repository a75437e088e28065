"""Scalar functions that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def soft_cap(x, cap):
    """(cap * tanh(x / cap), tanh(x / cap)), through one exp2 and one division."""
    doubled = tl.exp2(x * (2.0 * LOG2E / cap))
    tanh = 1.0 - 2.0 / (doubled + 1.0)
    return cap * tanh, tanh
