"""The sampled gradient's choice among the entries of a row (``vocabulary.sampling``).

One program per row, whose lanes walk the columns that are LANES apart. The running sum of the small entries' shares
s = |d| / threshold is a fraction of 32 bits, and runs down one lane after the other: its order is free, as long as it
is the same from the first to the last. The first walk finds the sum of each lane and how many entries it keeps if the
sum begins at 0; a prefix sum over the lanes then tells where each begins, in the running sum and among the entries,
and the second walk writes them. Each lane knows its places, so no walk waits for another thread. Both are sums of
integers, which come out alike in any order; the kept entries are the upper words of the same numbers whose lower
words are the fractions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import Pull, Selection
from .launch import ROW_SELECT, on_device
from .row_grad import gradient


@triton.jit
def _walk(base, start, cols, action, highest, rest, rate, total, stride, vocab, scale, softcap, LANES: tl.constexpr):
    """Each lane's next entry: (logits, their shares, whether they are small, the running sums, whether they are kept)."""
    x = tl.load(base + cols, mask=cols < stride, other=0.0).to(tl.float32)
    share = gradient(x, start, cols, -1, highest, rest, 0.0, rate, None, None, scale, softcap, LANES)
    share = tl.where(cols < vocab, share, 0.0)
    small = (share < 1.0) & (cols != action)
    steps = tl.where(small, tl.fma(share, 4294967296.0, 0.5), 0.0).to(tl.uint32)
    total += steps
    return x, share, small, total, (total < steps) | (share >= 1.0) | (cols == action)


@triton.jit
def row_select_kernel(
    logits, actions, top, log_total, d_action, d_softmax, threshold, fractions, offsets, columns, values, counts,
    stride, vocab, scale, softcap, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    action = tl.minimum(tl.maximum(tl.load(actions + row), 0), vocab - 1).to(tl.int32)
    highest, rest = tl.load(top + row), tl.load(log_total + row)
    by_action, by_softmax = tl.load(d_action + row), tl.load(d_softmax + row)
    least = tl.load(threshold)
    rate = tl.abs(by_softmax) / least
    signed = tl.where(by_softmax < 0, -least, least)
    lane = tl.arange(0, LANES)

    total = tl.zeros([LANES], tl.uint32)
    found = tl.zeros([LANES], tl.uint32)
    for start in range(0, vocab, LANES):
        _, _, _, total, kept = _walk(
            base, start, start + lane, action, highest, rest, rate, total, stride, vocab, scale, softcap, LANES
        )
        found += kept.to(tl.uint32)

    sums = (found.to(tl.uint64) << 32) + total.to(tl.uint64)
    ends = tl.cumsum(sums, 0) + tl.load(fractions + row).to(tl.uint32, bitcast=True).to(tl.uint64)
    begins = ends - sums
    total = begins.to(tl.uint32)
    place = (begins >> 32).to(tl.int32)
    count = tl.max((ends >> 32).to(tl.int32), 0)
    first = tl.load(offsets + row)
    room = (tl.load(offsets + row + 1) - first).to(tl.int32)
    tl.store(counts + row, tl.minimum(count, room))
    for start in range(0, vocab, LANES):
        cols = start + lane
        x, share, small, total, kept = _walk(
            base, start, cols, action, highest, rest, rate, total, stride, vocab, scale, softcap, LANES
        )
        entry = tl.where(small, signed, share * signed)
        if (action >= start) & (action < start + LANES):
            d = gradient(
                x, start, cols, action, highest, rest, by_action, by_softmax, None, None, scale, softcap, LANES
            )
            entry = tl.where(cols == action, d, entry)
        inside = kept & (place < room)
        tl.store(columns + first + place, cols, mask=inside)
        tl.store(values + first + place, entry, mask=inside)
        place += kept.to(tl.int32)
    if count > room:
        tl.debug_barrier()
        tl.store(values + first, float("nan"))  # never a plausible wrong number


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
