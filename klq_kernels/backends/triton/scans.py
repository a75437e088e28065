"""Reverse first-order linear recurrences over flat, packed tokens, with time split across programs.

Both scans here are S_t = a_t + b_t S_{t+1}. A stretch of tokens acts on what follows it as one pair (a, b), and
stretches compose associatively, (a, b) before (a', b') being (a + b a', b b'). So:

    1. every tile of TILE tokens reduces itself to its pair (``SUMMARISE``);
    2. every tile scans its tokens again, composes the pairs of the tiles after it, nearest first, until the product of
       the b is 0 (a sequence ended) or the tokens are over, which gives the S that flows into it.

One tile needs no first step. Few long rows are as fast as many short ones: the tiles do not know about rows. A
sequence end is b = 0 there, and nothing is ever multiplied across it (0 * inf would leak NaN); a masked token is the
identity (0, 1). Which sequence a token belongs to is found by bisection in cu_seqlens: no per-token boundary array.

``reverse_scan`` has a = delta, b = decay. ``lambda_errors`` scans S_t = gamma V_t + b_t A_t with A_t = u_t + S_{t+1}
and b_t = gamma lambda c_t (``portable.lambda_errors``); beyond the end of sequence i stands tail_i.

Loads ascend and the scan itself runs in reverse, so that they stay 16 bytes wide. The combine's first operand is then
the later stretch. Triton's reduce assumes a commutative combine, so tiles are summarised by a scan as well.

A thread takes four neighbours at a time, whatever the dtypes: 16 bytes of fp32. Left alone, Triton would give it as
many as make 16 bytes of the narrowest array, the mask of bytes; then two accesses would each touch every sector of
fp32 and use half of it. In the last tile, too, fours that lie inside are loaded as such, and what remains one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import ScanTerms
from .launch import SCAN, on_device, require_contiguous

# Triton makes a constant of an integer that is 1. A batch of one sequence would be one, and Triton 3.6 cannot compile
# the bisection then. One kernel for all counts is also compiled once.
COUNTS = ("n", "batch", "first_row")


@triton.jit
def compose(later_a, later_b, a, b):
    """The pair of a stretch followed by a later one; a closed stretch (b = 0) never looks at what follows."""
    return tl.where(b == 0, a, tl.fma(b, later_a, a)), tl.where(b == 0, 0.0, b * later_b)


@triton.jit
def _first(x, at_first):
    """The scalar x[0] of a tile."""
    return tl.sum(tl.where(at_first, x, 0.0), axis=0)


@triton.jit
def _inflow(pairs_a, pairs_b, tile, tiles, SLOTS: tl.constexpr):
    """S flowing into a tile: the pairs of the tiles after it, composed nearest first; slot ``tiles`` is the last."""
    slot = tl.arange(0, SLOTS)
    a = 0.0
    b = 1.0
    start = tile + 1
    while (start <= tiles) & (b != 0.0):
        inside = start + slot <= tiles
        next_a = tl.load(pairs_a + start + slot, mask=inside, other=0.0)
        next_b = tl.load(pairs_b + start + slot, mask=inside, other=1.0)
        next_a, next_b = tl.associative_scan((next_a, next_b), 0, compose, reverse=True)
        a, b = compose(_first(next_a, slot == 0), _first(next_b, slot == 0), a, b)
        start += SLOTS
    return a


@triton.jit
def _next(x, TILE: tl.constexpr):
    """x[i + 1] for each i but the last. A thread has four neighbours in its registers (``_load``), so that only the
    first of each four goes to another thread.
    """
    fours: tl.constexpr = TILE // 4
    even, odd = tl.split(tl.reshape(x, (fours, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    fifth = tl.gather(first, tl.minimum(tl.arange(0, fours) + 1, fours - 1), 0)
    return tl.reshape(tl.join(tl.join(second, fourth), tl.join(third, fifth)), (TILE,))


@triton.jit
def _bisect(position, low, high, width, cu_seqlens):
    """The largest b in low .. high (width = high - low, at the most) with cu_seqlens[b] <= position."""
    while width > 0:
        middle = (low + high + 1) // 2
        begun = tl.load(cu_seqlens + middle) <= position
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
        width = width // 2
    return low


@triton.jit
def _sequence_of(first, n, lane, cu_seqlens, batch, TILE: tl.constexpr):
    """(sequence of each position first + lane, whether the position is the last of its sequence).

    The tile's first and last positions are looked up as scalars; its tokens then search only between those two, which
    takes no step at all inside a long sequence.
    """
    zero = first * 0
    final = zero + (batch - 1)
    last = tl.minimum(first + TILE, n) - 1
    lowest = _bisect(first, zero, final, final, cu_seqlens)
    highest = _bisect(last, zero, final, final, cu_seqlens)
    position = tl.minimum(first + lane, last)
    none = tl.zeros_like(lane)
    sequence = _bisect(position, none + lowest, none + highest, highest - lowest, cu_seqlens)
    return sequence, (first + lane <= last) & (position + 1 == tl.load(cu_seqlens + sequence + 1))


@triton.jit
def _whole(i, n):
    """Whether an element and the three with which it makes 16 bytes of fp32 are all inside the array."""
    return i // 4 * 4 + 3 < n


@triton.jit
def _load(pointer, i, n, MASKED: tl.constexpr):
    """x[i], or 0 from n on where MASKED; i ascends from a multiple of 4."""
    place = tl.max_contiguous(pointer + i, 4)
    if MASKED:
        whole = _whole(i, n)
        x = tl.load(place, mask=whole, other=0)
        return tl.where(whole, x, tl.load(place, mask=(i < n) & ~whole, other=0))
    else:
        return tl.load(place)


@triton.jit
def _store(pointer, i, x, end, n):
    """Stores x[i], i ascending to ``end``, where i < n."""
    if end <= n:
        tl.store(pointer + i, x)
    else:
        whole = _whole(i, n)
        tl.store(pointer + i, x, mask=whole)
        tl.store(pointer + i, x, mask=(i < n) & ~whole)


@triton.jit
def _kept(mask, i, n, MASKED: tl.constexpr):
    """Whether an element is a valid token: inside the array, and not masked out."""
    keep = i < n
    if mask is not None:
        keep = keep & (_load(mask, i, n, MASKED) != 0)
    return keep


@triton.jit
def _scan_pairs(delta, decay, mask, i, n, ends, ONE_DECAY: tl.constexpr, MASKED: tl.constexpr):
    """(a, b, keep) of ``reverse_scan``."""
    a = _load(delta, i, n, MASKED).to(tl.float32)
    if ONE_DECAY:
        b = tl.zeros_like(a) + tl.load(decay).to(tl.float32)
    else:
        b = _load(decay, i, n, MASKED).to(tl.float32)
    keep = _kept(mask, i, n, MASKED)
    return tl.where(keep, a, 0.0), tl.where(ends, 0.0, tl.where(keep, b, 1.0)), keep


@triton.jit
def _lambda_pairs(
    logp, ref_logp, values, rewards, trace, mask, i, n, ends, beyond, tau, gamma, lam, MASKED: tl.constexpr
):
    """(a, b, u, keep) of ``lambda_errors``; ``beyond`` is the tail at sequence ends."""
    v = _load(values, i, n, MASKED).to(tl.float32)
    u = -v
    if rewards is not None:
        u = _load(rewards, i, n, MASKED).to(tl.float32) - v
    if logp is not None:
        u -= tau * (_load(logp, i, n, MASKED).to(tl.float32) - _load(ref_logp, i, n, MASKED).to(tl.float32))
    b = tl.zeros_like(v) + gamma * lam
    if trace is not None:
        b *= _load(trace, i, n, MASKED).to(tl.float32)
    keep = _kept(mask, i, n, MASKED)
    a = tl.where(keep, tl.fma(v, gamma, b * u), 0.0)
    b = tl.where(keep, b, 1.0)
    a = tl.where(ends, tl.fma(b, beyond, a), a)
    return a, tl.where(ends, 0.0, b), u, keep


@triton.jit(do_not_specialize=COUNTS)
def reverse_scan_kernel(
    delta, decay, mask, cu_seqlens, out, pairs_a, pairs_b, n, batch,
    ONE_DECAY: tl.constexpr, SUMMARISE: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    lane = tl.arange(0, TILE)
    i = tile * TILE + lane
    _, ends = _sequence_of(tile * TILE, n, lane, cu_seqlens, batch, TILE)
    if (tile + 1) * TILE <= n:
        a, b, keep = _scan_pairs(delta, decay, mask, i, n, ends, ONE_DECAY, False)
    else:
        a, b, keep = _scan_pairs(delta, decay, mask, i, n, ends, ONE_DECAY, True)
    a, b = tl.associative_scan((a, b), 0, compose, reverse=True)
    if SUMMARISE:
        tl.store(pairs_a + tile, _first(a, lane == 0))
        tl.store(pairs_b + tile, _first(b, lane == 0))
        if tile == 0:
            tl.store(pairs_a + tl.num_programs(0), 0.0)
            tl.store(pairs_b + tl.num_programs(0), 0.0)
    else:
        inflow = 0.0
        if pairs_a is not None:
            inflow = _inflow(pairs_a, pairs_b, tile, tl.num_programs(0), SLOTS)
        s = tl.where(b == 0, a, tl.fma(b, inflow, a))
        s = tl.where(keep, s, 0.0)
        _store(out, i, s, (tile + 1) * TILE, n)


@triton.jit(do_not_specialize=COUNTS)
def lambda_errors_kernel(
    logp, ref_logp, values, rewards, trace, tail, mask, cu_seqlens, out, carry, pairs_a, pairs_b,
    n, batch, first_row, tau, gamma, lam,
    SUMMARISE: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    lane = tl.arange(0, TILE)
    i = tile * TILE + lane
    sequence, ends = _sequence_of(first_row + tile * TILE, first_row + n, lane, cu_seqlens, batch, TILE)
    beyond = tl.load(tail + sequence, mask=ends, other=0.0)
    if (tile + 1) * TILE <= n:
        a, b, u, keep = _lambda_pairs(
            logp, ref_logp, values, rewards, trace, mask, i, n, ends, beyond, tau, gamma, lam, False
        )
    else:
        a, b, u, keep = _lambda_pairs(
            logp, ref_logp, values, rewards, trace, mask, i, n, ends, beyond, tau, gamma, lam, True
        )
    a, b = tl.associative_scan((a, b), 0, compose, reverse=True)
    if SUMMARISE:
        tl.store(pairs_a + tile, _first(a, lane == 0))
        tl.store(pairs_b + tile, _first(b, lane == 0))
        # the last slot keeps the value from beyond the last tile, before the first tile overwrites the carry
        if tile == 0:
            last = 0.0
            if carry is not None:
                last = tl.load(carry)
            tl.store(pairs_a + tl.num_programs(0), last)
            tl.store(pairs_b + tl.num_programs(0), 0.0)
    else:
        inflow = 0.0
        if pairs_a is not None:
            inflow = _inflow(pairs_a, pairs_b, tile, tl.num_programs(0), SLOTS)
        elif carry is not None:
            inflow = tl.load(carry)
        s = tl.where(b == 0, a, tl.fma(b, inflow, a))
        following = tl.where(lane == TILE - 1, inflow, _next(s, TILE))
        following = tl.where(ends, beyond, following)
        advantage = tl.where(keep, u + following, 0.0)
        _store(out, i, advantage, (tile + 1) * TILE, n)
        if carry is not None:
            tl.debug_barrier()  # every thread has read the old carry
            if tile == 0:
                tl.store(carry, _first(s, lane == 0))


def _pairs(n: int, device: torch.device) -> tuple[int, Tensor | None, Tensor | None]:
    """(number of tiles, room for their pairs and one more); no room where one tile is enough."""
    tiles = triton.cdiv(n, SCAN.sizes["TILE"])
    if tiles == 1:
        return tiles, None, None
    room = torch.empty(2, tiles + 1, dtype=torch.float32, device=device)
    return tiles, room[0], room[1]


def reverse_scan(delta: Tensor, decay: Tensor, mask: Tensor | None, cu_seqlens: Tensor, out: Tensor) -> None:
    """See ``portable.reverse_scan``."""
    require_contiguous(delta, decay, mask, cu_seqlens, out)
    n, batch = delta.numel(), cu_seqlens.numel() - 1
    tiles, pairs_a, pairs_b = _pairs(n, delta.device)
    with on_device(delta):
        for summarise in (True, False) if tiles > 1 else (False,):
            reverse_scan_kernel[(tiles,)](
                delta, decay, mask, cu_seqlens, out, pairs_a, pairs_b, n, batch,
                ONE_DECAY=decay.numel() == 1 != n, SUMMARISE=summarise,
                **SCAN.sizes, **SCAN.options,
            )  # fmt: skip


def lambda_errors(
    terms: ScanTerms,
    tail: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    out: Tensor,
    *,
    tau: float,
    gamma: float,
    lam: float,
    first_row: int = 0,
    carry: Tensor | None = None,
    kept_logp: Tensor | None = None,
    kept_values: Tensor | None = None,
) -> None:
    """See ``portable.lambda_errors``."""
    require_contiguous(*terms, tail, mask, cu_seqlens, out, kept_logp, kept_values)
    n, batch = out.numel(), cu_seqlens.numel() - 1
    if n == 0:
        return
    tiles, pairs_a, pairs_b = _pairs(n, out.device)
    with on_device(out):
        for summarise in (True, False) if tiles > 1 else (False,):
            lambda_errors_kernel[(tiles,)](
                *terms, tail, mask, cu_seqlens, out, carry, pairs_a, pairs_b,
                n, batch, first_row, tau, gamma, lam,
                SUMMARISE=summarise, **SCAN.sizes, **SCAN.options,
            )  # fmt: skip
    for source, kept in ((terms.logp, kept_logp), (terms.values, kept_values)):
        if source is not None and kept is not None:
            kept.copy_(source if mask is None else source.where(mask, 0.0))
