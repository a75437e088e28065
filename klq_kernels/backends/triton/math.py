"""Scalar functions that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def soft_cap(x, cap):
    """(cap * tanh(x / cap), its derivative 1 - tanh^2), through one exp2 and one division.

    With e = e^(2x/cap) and rest = 1 - tanh = 2 / (e + 1), the value is cap - cap rest and the slope rest (2 - rest).
    Where x < 0, rest is near 2 and 2 - rest would cancel: there it is e rest. The value cancels where x is small beside
    the cap: there it is x + x q, with q the odd series of tanh in z = (x / cap)^2 (a Chebyshev fit on [-1/2, 1/2],
    relative error 5e-9).

    Both forms of the value end in an explicit fma, so the compiler cannot contract a product of theirs into a caller's
    difference, which would leave one side of the difference unrounded.
    """
    y = x * (1.0 / cap)
    e = tl.exp2(y * (2.0 * LOG2E))
    rest = 2.0 / (e + 1.0)
    z = y * y
    q = tl.fma(z, -0.0069469986, 0.021472719)
    q = tl.fma(z, q, -0.053933788)
    q = tl.fma(z, q, 0.13333227)
    q = z * tl.fma(z, q, -0.33333331)
    capped = tl.where(tl.abs(y) < 0.5, tl.fma(x, q, x), tl.fma(-cap, rest, cap + tl.zeros_like(x)))
    return capped, rest * tl.where(e < 1.0, e * rest, 2.0 - rest)
