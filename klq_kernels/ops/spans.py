"""Backward recurrences over sequences whose time is cut into spans, one for each rank of a group, in rank order.

What follows a span reaches it through one number per sequence, x, and the span hands on a + b x: a is what it makes of
its own tokens, b the product of its decays. So every rank scans its own tokens, one all-gather shares the pairs
(a, b), each rank folds those of the ranks after it into its x, and finishes. A span without a valid token of a
sequence hands on what it got, (0, 1).

For the lambda-errors x is the term after the last token, gamma V' + gamma lam c' A' of the next valid one; after the
last rank it is ``scans.tail_values``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..vocabulary.collectives import add_up, all_gather
from . import scans


def reverse_scan(
    delta: Tensor, decay: Tensor, mask: Tensor | None, cu_seqlens: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """``scans.reverse_scan`` over all ranks' tokens: this rank's part, fp32 [M]. Differentiable."""
    alone = scans.reverse_scan(delta, decay, mask, cu_seqlens)
    decays = decay.float().expand(delta.shape)
    ends = _Ends(mask, cu_seqlens, delta.numel())
    products = _products_to_the_end(decays, ends, mask, cu_seqlens)
    after = _after(group, ends.at_first(alone, 0.0), ends.at_first(products, 1.0), alone.new_zeros(ends.found.shape))
    carried = products * after[ends.sequence]
    return alone + (carried if mask is None else torch.where(mask, carried, 0.0))


def tail_values(
    group: dist.ProcessGroup,
    columns: tuple[Tensor | None, ...],
    tail: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    tau: float,
    gamma: float,
    lam: float,
) -> Tensor:
    """fp32 [B]: the term after this rank's last token of each sequence, for ``scans.lambda_errors`` (its arguments)."""
    *_, values, _, trace = columns
    assert values is not None
    alone = scans.lambda_errors(*columns, torch.zeros_like(tail), mask, cu_seqlens, tau, gamma, lam)
    decays = gamma * lam * (torch.ones_like(alone) if trace is None else trace.float())
    ends = _Ends(mask, cu_seqlens, values.numel())
    products = _products_to_the_end(decays, ends, mask, cu_seqlens)
    return _after(
        group, ends.at_first(gamma * values.float() + decays * alone, 0.0), ends.at_first(products, 1.0), tail
    )


class _Ends:
    """The first and the last valid position of each sequence; found without waiting for a GPU."""

    def __init__(self, mask: Tensor | None, cu_seqlens: Tensor, m: int) -> None:
        at = torch.arange(m, device=cu_seqlens.device)
        self.sequence = torch.bucketize(at, cu_seqlens[1:].long(), right=True)
        batch = cu_seqlens.numel() - 1
        early, late = (at, at) if mask is None else (torch.where(mask, at, m), torch.where(mask, at, -1))
        self.first = torch.full((batch,), m, device=at.device).scatter_reduce_(0, self.sequence, early, "amin")
        last = torch.full((batch,), -1, device=at.device).scatter_reduce_(0, self.sequence, late, "amax")
        self.found = last >= 0
        self.is_last = at == last[self.sequence]

    def at_first(self, column: Tensor, otherwise: float) -> Tensor:
        """[B]: the column at each sequence's first valid token, ``otherwise`` where it has none."""
        if not column.numel():  # the sum of nothing keeps this rank in the graph
            return (column.sum() + otherwise).expand(self.found.shape)
        return torch.where(self.found, column[self.first.clamp(max=column.numel() - 1)], otherwise)


def _products_to_the_end(decays: Tensor, ends: _Ends, mask: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """fp32 [M]: the product of the decays of a valid token and of those after it in its sequence."""
    return scans.reverse_scan(torch.where(ends.is_last, decays, 0.0), decays, mask, cu_seqlens)


def _after(group: dist.ProcessGroup, a: Tensor, b: Tensor, end: Tensor) -> Tensor:
    """fp32 [B]: x of this rank. ``end`` is that of the last rank.

    Every rank folds all pairs, so that the backward of the all-gather, a collective too, runs on all of them.
    """
    pairs = _AllGather.apply(torch.stack([a, b]), group).double()
    after = [end.double()]
    for rank in reversed(range(1, group.size())):
        after.append(pairs[rank, 0] + pairs[rank, 1] * after[-1])
    return torch.stack(after[::-1])[group.rank()].float()


class _AllGather(torch.autograd.Function):
    """[ranks, ...] of every rank's tensor; the gradient of a rank's own is the sum of what the ranks made of it."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(mine, group)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None]:
        total = by.contiguous().clone()
        add_up(total, ctx.group).wait()
        return total[ctx.group.rank()], None
