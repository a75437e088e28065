"""The sampled gradient's choice among the entries of a row (``vocabulary.sampling``), in little more than one read.

With s the share |d| / threshold of an entry, the running sum of a row's small shares is a fraction of 32 bits, and an
entry at which it passes a whole number is kept. Few are. So one program per row first adds up segments of SEGMENT
columns, as numbers of 64 bits: the lower word counts the shares in 2^-32, the upper one the entries that are kept
whatever the running sum is. A prefix sum over the segments tells where the sum begins in each, and, by the upper words,
which of them keep an entry. Only those are read again, HITS at a time, and gone through entry by entry.

The list of those segments, with the fraction that each begins at, lies where the row's entries are going to be. It is
worked off from its end: no segment keeps fewer than one entry, so what is written lies behind all that is still to be
read. All sums are of integers, which come out alike in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import Pull, Selection
from .launch import ROW_SELECT, on_device, require_contiguous
from .row_grad import gradient
from .row_stats import biased


@triton.jit
def _shares(base, bias, cols, action, highest, rest, rate, stride, vocab, scale, softcap):
    """Of these columns the share of the threshold, in 2^-32 where it counts, else 0; and whether it keeps the entry, as
    that of the action does whatever it is.
    """
    x = biased(tl.load(base + cols, mask=cols < stride, other=0.0).to(tl.float32), bias, cols, cols < stride)
    share = gradient(x, 0, cols, -1, highest, rest, 0.0, rate, None, None, scale, softcap, 1)
    share = tl.where(cols < vocab, share, 0.0)
    share = tl.where(cols == action, 1.0, share)
    steps = tl.where(share < 1.0, tl.fma(share, 4294967296.0, 0.5), 0.0).to(tl.uint32)
    return share, steps, share >= 1.0  # NaN is neither


@triton.jit
def row_select_kernel(
    logits, bias, actions, top, log_total, d_action, d_softmax, threshold, fractions, offsets, columns, values, counts,
    sums, stride, vocab, segments, scale, softcap,
    GROUPS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr, HITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    sums += row * segments
    action = tl.minimum(tl.maximum(tl.load(actions + row), 0), vocab - 1).to(tl.int32)
    highest, rest = tl.load(top + row), tl.load(log_total + row)
    by_action, by_softmax = tl.load(d_action + row), tl.load(d_softmax + row)
    least = tl.load(threshold)
    rate = tl.abs(by_softmax) / least
    lane = tl.arange(0, SEGMENT)[None, :]

    for first in range(0, segments, GROUPS):
        segment = first + tl.arange(0, GROUPS)
        cols = segment[:, None] * SEGMENT + lane
        _, steps, large = _shares(base, bias, cols, action, highest, rest, rate, stride, vocab, scale, softcap)
        found = tl.sum((large.to(tl.uint64) << 32) + steps.to(tl.uint64), 1)
        tl.store(sums + segment, found.to(tl.int64, bitcast=True), mask=segment < segments)

    begin = tl.load(offsets + row)
    room = (tl.load(offsets + row + 1) - begin).to(tl.int32)
    columns += begin
    values += begin
    bits = values.to(tl.pointer_type(tl.uint32), bitcast=True)
    total = tl.load(fractions + row).to(tl.uint32, bitcast=True).to(tl.uint64)
    hits = 0
    tl.debug_barrier()
    for first in range(0, segments, BLOCK):
        segment = first + tl.arange(0, BLOCK)
        found = tl.load(sums + segment, mask=segment < segments, other=0).to(tl.uint64, bitcast=True)
        ends = tl.cumsum(found, 0) + total
        begins = ends - found
        hit = (ends >> 32) != (begins >> 32)
        rank = tl.cumsum(hit.to(tl.int32), 0) + (hits - 1)
        listed = hit & (rank < room)
        hits += tl.sum(hit.to(tl.int32), 0)
        total += tl.sum(found, 0)
        tl.store(columns + rank, segment, mask=listed)
        tl.store(bits + rank, begins.to(tl.uint32), mask=listed)

    kept = (total >> 32).to(tl.int32)
    tl.store(counts + row, tl.minimum(kept, room))
    x = biased(tl.load(base + action).to(tl.float32), bias, action, None)
    d = gradient(x, action, action, action, highest, rest, by_action, by_softmax, None, None, scale, softcap, 1)
    signed = tl.where(by_softmax < 0, -least, least)
    if kept > room:  # never a plausible wrong number
        signed *= float("nan")
        d *= float("nan")
    last = tl.minimum(hits, room)
    batches = tl.cdiv(last, HITS)
    end = tl.minimum(kept, room)
    tl.debug_barrier()
    for batch in range(0, batches):
        rank = (batches - 1 - batch) * HITS + tl.arange(0, HITS)
        there = rank < last
        segment = tl.load(columns + rank, mask=there, other=segments)  # which has no columns
        start = tl.load(bits + rank, mask=there, other=0)
        tl.debug_barrier()
        cols = segment[:, None] * SEGMENT + lane
        share, steps, large = _shares(base, bias, cols, action, highest, rest, rate, stride, vocab, scale, softcap)
        here = ((tl.cumsum(steps, 1) + start[:, None] < steps) | large).to(tl.int32)
        of_segment = tl.sum(here, 1)
        of_batch = tl.sum(of_segment, 0)
        before = end - of_batch + tl.cumsum(of_segment, 0) - of_segment
        place = before[:, None] + tl.cumsum(here, 1) - 1
        entry = tl.where(cols == action, d, tl.where(share < 1.0, signed, share * signed))
        inside = (here != 0) & (place >= 0) & (place < room)
        tl.store(columns + place, cols, mask=inside)
        tl.store(values + place, entry, mask=inside)
        end -= of_batch


def row_select(
    logits: Tensor,
    actions: Tensor,
    pull: Pull,
    selection: Selection,
    *,
    scale: float,
    softcap: float | None,
    bias: Tensor | None = None,
) -> None:
    """See ``portable.row_select``, and ``row_stats`` for ``bias``."""
    require_contiguous(actions, *pull, *selection, bias)
    n, vocab = logits.shape
    segments = triton.cdiv(vocab, ROW_SELECT.sizes["SEGMENT"])
    sums = torch.empty(n, segments, dtype=torch.int64, device=logits.device)
    with on_device(logits):
        row_select_kernel[(n,)](
            logits, bias, actions, *pull[:4], *selection, sums, logits.stride(0), vocab, segments, scale, softcap,
            **ROW_SELECT.sizes, **ROW_SELECT.options,
        )  # fmt: skip
