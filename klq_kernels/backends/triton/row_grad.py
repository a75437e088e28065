"""The gradient by a row of logits, written over the logits.

Everything of vocabulary size in the KLQ gradient is a row scalar times a softmax row. With k = log2(e) / temperature
and p = 2^(k (x - top) - log_total log2(e)), each logit x becomes

    (d_action [v = action] + d_softmax p - d_entropy p (log p + entropy)) * scale * (slope of the soft cap):

one read, one exp2, one write per logit. Where the gradient has the dtype of the logits, programs are (row, block of
columns). Where it is narrower, it fills the first part of the row's memory: a program then walks a whole row from left
to right, and a barrier between its reads and its writes keeps what it writes behind what it has read. Only the block
that holds the taken token compares columns with it.

Where a bias is learnt, its gradient is the sum over rows. A program then takes ROWS rows of its block of columns, and
adds up what it writes in registers, before it is rounded. The sums of each group of rows, 2 / ROWS of the bytes of
16-bit logits, are all that is read again: the groups add up in one more reduction, always in the same order. A program
that walks whole rows has no room for their sums; so a narrower gradient is read once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import Pull
from .launch import ROW_GRAD, ROW_GRAD_SUMS, on_device
from .math import LN2, LOG2E, soft_cap
from .row_stats import biased


@triton.jit
def gradient(
    x, start, cols, action, top, log_total, d_action, d_softmax, d_entropy, entropy, scale, softcap, BLOCK: tl.constexpr
):
    """The gradient by the logits x of columns start .. start + BLOCK - 1; all but x and cols are numbers of the row."""
    if softcap is not None:
        x, slope = soft_cap(x, softcap)
    log2_p = tl.fma(x - top, scale * LOG2E, -log_total * LOG2E)
    p = tl.exp2(log2_p)
    if d_entropy is not None:
        excess = tl.fma(log2_p, LN2, entropy)
        d = tl.where(p > 0, p * (d_softmax * scale - d_entropy * scale * excess), 0.0)
    else:
        d = p * (d_softmax * scale)
    if (action >= start) & (action < start + BLOCK):
        d += tl.where(cols == action, d_action * scale, 0.0)
    if softcap is not None:
        d *= slope
    return d


@triton.jit
def row_grad_kernel(
    logits, bias, actions, top, log_total, d_action, d_softmax, d_entropy, entropy, out, stride, out_stride, scale,
    softcap, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    last = first + BLOCK
    if NARROW:
        last = stride
    action = tl.load(actions + row)
    highest, rest = tl.load(top + row), tl.load(log_total + row)
    by_action, by_softmax = tl.load(d_action + row), tl.load(d_softmax + row)
    by_entropy = None
    spread = None
    if d_entropy is not None:
        by_entropy, spread = tl.load(d_entropy + row), tl.load(entropy + row)
    for start in range(first, last, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < stride  # up to the end of the row's padding, so that the whole access stays 16 bytes wide
        x = biased(tl.load(logits + row * stride + cols, mask=inside, other=0.0).to(tl.float32), bias, cols, inside)
        d = gradient(
            x, start, cols, action, highest, rest, by_action, by_softmax, by_entropy, spread, scale, softcap, BLOCK
        )
        if NARROW:
            tl.debug_barrier()
        tl.store(out + row * out_stride + cols, d.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def row_grad_sums_kernel(
    logits, bias, actions, top, log_total, d_action, d_softmax, d_entropy, entropy, out, sums, n, stride, out_stride,
    scale, softcap, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    inside = cols < stride
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(group * ROWS, tl.minimum(group * ROWS + ROWS, n)):
        by_entropy = None
        spread = None
        if d_entropy is not None:
            by_entropy, spread = tl.load(d_entropy + row), tl.load(entropy + row)
        x = biased(tl.load(logits + row * stride + cols, mask=inside, other=0.0).to(tl.float32), bias, cols, inside)
        d = gradient(
            x, start, cols, tl.load(actions + row), tl.load(top + row), tl.load(log_total + row),
            tl.load(d_action + row), tl.load(d_softmax + row), by_entropy, spread, scale, softcap, BLOCK,
        )  # fmt: skip
        total += d
        tl.store(out + row * out_stride + cols, d.to(out.dtype.element_ty), mask=inside)
    tl.store(sums + group * stride + cols, total, mask=inside)


def row_grad(
    logits: Tensor,
    actions: Tensor,
    pull: Pull,
    out: Tensor,
    column_sums: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None,
    bias: Tensor | None = None,
) -> None:
    """See ``portable.row_grad``, and ``row_stats`` for ``bias``."""
    n, vocab = logits.shape
    narrow = out.dtype != logits.dtype
    strides = logits.stride(0), out.stride(0)
    parts = out  # whose rows add up to the sums
    with on_device(logits):
        if column_sums is None or narrow:
            row_grad_kernel[(n, 1 if narrow else triton.cdiv(vocab, ROW_GRAD.sizes["BLOCK"]))](
                logits, bias, actions, *pull, out, *strides, scale, softcap, NARROW=narrow,
                **ROW_GRAD.sizes, **ROW_GRAD.options,
            )  # fmt: skip
        else:
            groups = triton.cdiv(n, ROW_GRAD_SUMS.sizes["ROWS"])
            parts = torch.empty(groups, strides[0], dtype=torch.float32, device=logits.device)[:, :vocab]
            row_grad_sums_kernel[(groups, triton.cdiv(vocab, ROW_GRAD_SUMS.sizes["BLOCK"]))](
                logits, bias, actions, *pull, out, parts, n, *strides, scale, softcap,
                **ROW_GRAD_SUMS.sizes, **ROW_GRAD_SUMS.options,
            )  # fmt: skip
    if column_sums is not None:
        column_sums += parts.sum(0, dtype=torch.float32)
