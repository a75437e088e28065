"""The gradient by a row of logits, written over the logits.

Everything of vocabulary size in the KLQ gradient is a row scalar times a softmax row. With k = log2(e) / temperature
and p = 2^(k (x - top) - log_total log2(e)), each logit x becomes

    (d_action [v = action] + d_softmax p - d_entropy p (log p + entropy)) * scale * (slope of the soft cap):

one read, one exp2, one write per logit. Programs are (row, block of columns); only the block that holds the taken token
compares columns with it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import Pull
from .launch import ROW_GRAD, on_device
from .math import LN2, LOG2E, soft_cap


@triton.jit
def row_grad_kernel(
    logits, actions, top, log_total, d_action, d_softmax, d_entropy, entropy, stride, scale, softcap,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    inside = cols < stride  # up to the end of the row's padding, so that the whole access stays 16 bytes wide
    cells = logits + row * stride + cols
    x = tl.load(cells, mask=inside, other=0.0).to(tl.float32)
    if softcap is not None:
        x, slope = soft_cap(x, softcap)
    log2_p = tl.fma(x - tl.load(top + row), scale * LOG2E, -tl.load(log_total + row) * LOG2E)
    p = tl.exp2(log2_p)
    factor = tl.load(d_softmax + row) * scale
    if d_entropy is not None:
        by_entropy = tl.load(d_entropy + row) * scale
        excess = tl.fma(log2_p, LN2, tl.load(entropy + row))
        d = tl.where(p > 0, p * (factor - by_entropy * excess), 0.0)
    else:
        d = p * factor
    action = tl.load(actions + row)
    if (action >= start) & (action < start + BLOCK):
        d += tl.where(cols == action, tl.load(d_action + row) * scale, 0.0)
    if softcap is not None:
        d *= slope
    tl.store(cells, d.to(logits.dtype.element_ty), mask=inside)


def row_grad_(logits: Tensor, actions: Tensor, pull: Pull, *, scale: float, softcap: float | None) -> None:
    """See ``portable.row_grad_``."""
    n, vocab = logits.shape
    with on_device(logits):
        row_grad_kernel[(n, triton.cdiv(vocab, ROW_GRAD.sizes["BLOCK"]))](
            logits, actions, *pull, logits.stride(0), scale, softcap,
            **ROW_GRAD.sizes, **ROW_GRAD.options,
        )  # fmt: skip
