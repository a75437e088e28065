"""The divergence of two rows of logits, and its gradient by the first of them, written over that one.

One program per row pair. It walks each row once for its normaliser (``row_stats.statistics``), and then both together:
with a and b the binary logarithms of the two probabilities, each by one fma and one exp2, and d = (a - b) ln 2,

    KL = sum 2^a h(d),        h(d) = d + exp(-d) - 1 >= 0,

whose terms ``portable.row_kl`` explains. For |d| < 1/2 they come from the series of h, so that a divergence of 1e-6
keeps its digits; beyond, 2^a d + (2^b - 2^a) has nothing left to cancel. Two reads of both rows: the second finds what
the first left in the L2 cache where the rows are short enough.

The gradient is one read of both rows, and is written as ``row_grad`` writes it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import Divergence, Pair
from .launch import ROW_KL, ROW_KL_GRAD, on_device, require_contiguous
from .math import LN2, LOG2E, soft_cap
from .row_stats import statistics


@triton.jit
def _log2_p(x, top, log_total, scale, softcap):
    """The binary logarithm of the softmax at logits x of a row, and the slope of the soft cap there."""
    slope = 1.0
    if softcap is not None:
        x, slope = soft_cap(x, softcap)
    return tl.fma(x - top, scale * LOG2E, -log_total * LOG2E), slope


@triton.jit
def _terms(a, b):
    """2^a h(d) of each entry, with d = (a - b) ln 2. What both forbid has no part in it."""
    p, q = tl.exp2(a), tl.exp2(b)
    d = (a - b) * LN2
    ratio = tl.fma(d, 1 / 40320, -1 / 5040)
    ratio = tl.fma(ratio, d, 1 / 720)
    ratio = tl.fma(ratio, d, -1 / 120)
    ratio = tl.fma(ratio, d, 1 / 24)
    ratio = tl.fma(ratio, d, -1 / 6)
    ratio = tl.fma(ratio, d, 1 / 2)
    far = tl.where(p > 0, p * d, 0.0) + (q - p)
    return tl.where(tl.abs(d) < 0.5, ratio * d * d * p, far)


@triton.jit
def row_kl_kernel(
    logits, ref_logits, top, log_total, ref_top, ref_log_total, kl, stride, ref_stride, vocab, scale, softcap,
    ref_scale, ref_softcap,
    REVERSE: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base, ref_base = logits + row * stride, ref_logits + row * ref_stride
    # of no entry in particular: its log-probability is not used
    highest, rest, _logp, _entropy = statistics(base, None, 0, stride, vocab, scale, softcap, False, GROUPS, LANES)
    ref_highest, ref_rest, _logp, _entropy = statistics(
        ref_base, None, 0, ref_stride, vocab, ref_scale, ref_softcap, False, GROUPS, LANES
    )
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(base + cols, mask=cols < stride, other=0.0).to(tl.float32)
        y = tl.load(ref_base + cols, mask=cols < ref_stride, other=0.0).to(tl.float32)
        a, _slope = _log2_p(x, highest, rest, scale, softcap)
        b, _ref_slope = _log2_p(y, ref_highest, ref_rest, ref_scale, ref_softcap)
        if REVERSE:
            terms = _terms(b, a)
        else:
            terms = _terms(a, b)
        total += tl.where(cols < vocab, terms, 0.0)
    tl.store(top + row, highest)
    tl.store(log_total + row, rest)
    tl.store(ref_top + row, ref_highest)
    tl.store(ref_log_total + row, ref_rest)
    tl.store(kl + row, tl.sum(total, axis=0))


@triton.jit
def row_kl_grad_kernel(
    logits, ref_logits, top, log_total, ref_top, ref_log_total, kl, d_kl, out, stride, ref_stride, out_stride, scale,
    softcap, ref_scale, ref_softcap,
    REVERSE: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    last = first + BLOCK
    if NARROW:
        last = stride
    highest, rest = tl.load(top + row), tl.load(log_total + row)
    ref_highest, ref_rest = tl.load(ref_top + row), tl.load(ref_log_total + row)
    divergence = tl.load(kl + row)
    factor = tl.load(d_kl + row) * scale
    for start in range(first, last, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < stride  # as in row_grad
        x = tl.load(logits + row * stride + cols, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(ref_logits + row * ref_stride + cols, mask=cols < ref_stride, other=0.0).to(tl.float32)
        a, slope = _log2_p(x, highest, rest, scale, softcap)
        b, _ref_slope = _log2_p(y, ref_highest, ref_rest, ref_scale, ref_softcap)
        p = tl.exp2(a)
        if REVERSE:
            d = p - tl.exp2(b)
        else:
            d = tl.where(p > 0, p * tl.fma(a - b, LN2, -divergence), 0.0)
        d *= factor
        if softcap is not None:
            d *= slope
        if NARROW:
            tl.debug_barrier()
        tl.store(out + row * out_stride + cols, d.to(out.dtype.element_ty), mask=inside)


def row_kl(logits: Tensor, ref_logits: Tensor, out: Divergence, *, pair: Pair) -> None:
    """See ``portable.row_kl``."""
    require_contiguous(*out)
    n, vocab = logits.shape
    config = ROW_KL[max(logits.element_size(), ref_logits.element_size())]
    with on_device(logits):
        row_kl_kernel[(n,)](
            logits, ref_logits, *out, logits.stride(0), ref_logits.stride(0), vocab, *pair[:4], REVERSE=pair.reverse,
            **config.sizes, **config.options,
        )  # fmt: skip


def row_kl_grad(
    logits: Tensor, ref_logits: Tensor, found: Divergence, d_kl: Tensor, out: Tensor, *, pair: Pair
) -> None:
    """See ``portable.row_kl_grad``."""
    require_contiguous(*found, d_kl)
    n, vocab = logits.shape
    narrow = out.dtype != logits.dtype
    with on_device(logits):
        row_kl_grad_kernel[(n, 1 if narrow else triton.cdiv(vocab, ROW_KL_GRAD.sizes["BLOCK"]))](
            logits, ref_logits, *found, d_kl, out, logits.stride(0), ref_logits.stride(0), out.stride(0), *pair[:4],
            REVERSE=pair.reverse, NARROW=narrow, **ROW_KL_GRAD.sizes, **ROW_KL_GRAD.options,
        )  # fmt: skip
