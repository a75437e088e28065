"""The sampled gradient's choice among the entries of a row (``vocabulary.sampling``), in one read of the logits.

One program per row walks blocks of columns from left to right. With s the share |d| / threshold of an entry, the running
sum of the small ones is a fraction of 32 bits: a prefix sum over the block, whose carry at an entry means that the sum
passed a whole number there. A second prefix sum, over the kept entries, gives each its place. Both are sums of integers,
so the entries are the same whatever the order of additions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import Pull, Selection
from .launch import ROW_SELECT, on_device
from .row_grad import gradient


@triton.jit
def row_select_kernel(
    logits, actions, top, log_total, d_action, d_softmax, threshold, fractions, offsets, columns, values, counts,
    stride, vocab, scale, softcap, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    action = tl.minimum(tl.maximum(tl.load(actions + row), 0), vocab - 1)
    highest, rest = tl.load(top + row), tl.load(log_total + row)
    by_action, by_softmax = tl.load(d_action + row), tl.load(d_softmax + row)
    least = tl.load(threshold)
    rate = tl.abs(by_softmax) / least
    signed = tl.where(by_softmax < 0, -least, least)
    total = tl.load(fractions + row).to(tl.uint32, bitcast=True)
    first = tl.load(offsets + row)
    room = (tl.load(offsets + row + 1) - first).to(tl.int32)
    count = 0
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(base + cols, mask=cols < stride, other=0.0).to(tl.float32)
        share = gradient(x, start, cols, -1, highest, rest, 0.0, rate, None, None, scale, softcap, BLOCK)
        share = tl.where(cols < vocab, share, 0.0)
        taken = cols == action
        small = (share < 1.0) & (cols != action)
        steps = tl.where(small, tl.fma(share, 4294967296.0, 0.5), 0.0).to(tl.uint32)
        sums = tl.cumsum(steps, 0) + total
        kept = (sums < sums - steps) | (share >= 1.0) | taken
        ones = kept.to(tl.int32)
        places = tl.cumsum(ones, 0) + (count - 1)
        entry = tl.where(small, signed, share * signed)
        if (action >= start) & (action < start + BLOCK):
            d = gradient(
                x, start, cols, action, highest, rest, by_action, by_softmax, None, None, scale, softcap, BLOCK
            )
            entry = tl.where(taken, d, entry)
        inside = kept & (places < room)
        tl.store(columns + first + places, cols, mask=inside)
        tl.store(values + first + places, entry, mask=inside)
        total += tl.sum(steps, 0)
        count += tl.sum(ones, 0)
    tl.store(counts + row, tl.minimum(count, room))
    tl.store(values + first, float("nan"), mask=count > room)  # never a plausible wrong number


def row_select(
    logits: Tensor, actions: Tensor, pull: Pull, selection: Selection, *, scale: float, softcap: float | None
) -> None:
    """See ``portable.row_select``."""
    n, vocab = logits.shape
    with on_device(logits):
        row_select_kernel[(n,)](
            logits, actions, *pull[:4], *selection, logits.stride(0), vocab, scale, softcap,
            **ROW_SELECT.sizes, **ROW_SELECT.options,
        )  # fmt: skip
