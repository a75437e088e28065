"""Data parallelism with a split head: the tokens come to the head, or the head to the tokens.

Each rank of a group has tokens of its own and some rows of the head. Where the tokens move, the valid ones of all
ranks, one rank's after another's, make one packed batch, on which every rank does the work of its rows of the head
(``vocabulary.sharded``). So a whole weight, or a whole gradient of it, is nowhere; N H numbers of hidden states move,
and as many of their gradient. Where the head moves, each rank gets it whole, makes the plain call on its own tokens,
and gives back V H numbers of the weight's gradient. Whichever moves, the results are the same but for rounding: where
the head moves, a 16-bit gradient of it is rounded on each rank before those of the ranks are added.

Gradients follow the convention of data parallelism, in which those of the ranks are averaged: with L the mean over
ranks of what each makes of its own tokens, a rank's rows of the weight get dL/dW, which needs no further reduction, and
its hidden states get R dL/dhidden, whose mean over ranks a trunk's parameters then take.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..vocabulary.collectives import add_up_rows, gather_rows
from .group import agree, bits_of, dtypes_of
from .layout import Layout, check_extremes, extremes, valid_rows
from .transforms import needs_gradient

PER_TOKEN = (
    "hidden", "actions", "values", "old_logp", "old_values", "advantages", "ref_logp", "rewards", "trace", "weights",
)  # fmt: skip
LAYOUT = ("mask", "cu_seqlens", "rows")
PER_SEQUENCE = ("scores", "bootstrap_values")
LEARNT = ("hidden", "weight", "bias", "values")


class AllTokens:
    """The valid tokens of all ranks as one packed batch.

    ``own``: the arguments of an operator, flat, with this rank's tokens. ``settings``: what all ranks must pass alike.
    Raises the ValueError of ``group.agree``.
    """

    def __init__(self, group: dist.ProcessGroup, layout: Layout, own: dict[str, Any], settings: dict[str, Any]) -> None:
        self._group, self._own = group, own
        self._positions = math.prod(layout.shape)
        self._index, cu_seqlens = valid_rows(**layout.row_args(), positions=self._positions)
        n = self._positions if self._index is None else self._index.numel()
        shared = {name: dtype for name, dtype in dtypes_of(own).items() if name not in LAYOUT}
        learnt = {name for name in LEARNT if own.get(name) is not None and needs_gradient(own[name])}
        alike = {**settings, "given": shared, "requires_grad": sorted(learnt)}
        taken = own["actions"] if self._index is None else own["actions"][self._index]
        sizes = (n, cu_seqlens.numel() - 1, own["weight"].shape[0], *extremes(taken))
        everyones = agree(group, cu_seqlens.device, alike, sizes, (bits_of(own.get("denom")),))
        columns = list(zip(*everyones, strict=True))
        self._counts, self._batches, self._rows_of_head = map(list, columns[:3])
        self._extremes = min(columns[3]), max(columns[4])
        self._learnt = learnt
        self._cu_seqlens = cu_seqlens

    def move_head(self, sharding: str | None, *, split_again: bool) -> bool:
        """Whether the head is to move: as told, where its rows are ``split_again``, or where that moves fewer bytes."""
        if sharding is not None or split_again:
            return sharding != "tokens"
        own, n, vocab = self._own, sum(self._counts), sum(self._rows_of_head)
        width, learnt = own["hidden"].shape[-1], self._learnt
        tokens = n * width * (own["hidden"].element_size() + (8 if "hidden" in learnt else 0))  # fp32 sums, to all
        head = vocab * width * own["weight"].element_size() * (2 if "weight" in learnt else 1)
        return head < tokens

    def with_whole_head(self, vocab: int) -> dict[str, Any]:
        """The arguments of the operator on this rank's tokens, with all rows of the head that the group has.

        The gradient by its rows of the head is the mean over ranks. A loss is divided by the ranks' mean count, so the
        mean over ranks is that of the batch. Token ids out of range on any rank are refused on all.
        """
        check_extremes(*self._extremes, vocab)
        own = self._own
        found = {
            name: _WholeHead.apply(own[name], self._rows_of_head, self._group)
            for name in ("weight", "bias") if own[name] is not None
        }  # fmt: skip
        if own.get("denom", 0) is None:
            found["denom"] = mean_count(self._counts, self._cu_seqlens.device)
        return {**own, **found}

    @property
    def counts(self) -> list[int]:
        """The number of tokens of each rank."""
        return self._counts

    def _lengths(self) -> Tensor:
        """int32 [B + 1]: where the sequences of the batch end."""
        lengths = gather_rows(self._cu_seqlens.diff(), self._batches, self._group)
        return pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the operator on the batch.

        The gradient by a rank's hidden states and values is R times that of the batch.
        """
        own = self._own
        found = {name: self._rows(own[name]) for name in PER_TOKEN if own.get(name) is not None}
        found |= {name: self._sequences(own[name]) for name in PER_SEQUENCE if own.get(name) is not None}
        if own.get("denom") is not None:
            found["denom"] = own["denom"] * self._group.size()
        return {**own, **found, "mask": None, "rows": None, "cu_seqlens": self._lengths()}

    def own(self, rows: Tensor) -> Tensor:
        """This rank's values of a vector over the batch, [M], 0 at masked tokens. The gradient of the batch is that of
        all ranks, divided by R.
        """
        found: Tensor = _Own.apply(rows, self._counts, self._group)
        if self._index is None:
            return found
        return found.new_zeros(self._positions).index_copy(0, self._index, found)

    def _rows(self, tensor: Tensor) -> Tensor:
        own = tensor if self._index is None else tensor[self._index]
        found: Tensor = _Rows.apply(own.contiguous(), self._counts, self._group)
        return found

    def _sequences(self, tensor: Tensor) -> Tensor:
        return gather_rows(tensor.contiguous(), self._batches, self._group)


def mean_count(counts: list[int], device: torch.device) -> Tensor:
    """fp32, 0-d: the divisor with which the mean over ranks of their losses is the loss of all their tokens."""
    return torch.full((), max(sum(counts), 1) / len(counts), dtype=torch.float32, device=device)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.mine, ctx.size = _place(counts, group), group.size()
        return gather_rows(own, counts, group)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None, None]:
        return by[ctx.mine] * ctx.size, None, None


class _WholeHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_rows(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None, None]:
        return add_up_rows(by.contiguous(), ctx.counts, ctx.group) / ctx.group.size(), None, None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return rows[_place(counts, group)].clone()

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None, None]:
        return gather_rows(by.contiguous(), ctx.counts, ctx.group) / ctx.group.size(), None, None


def _place(counts: list[int], group: dist.ProcessGroup) -> slice:
    first = sum(counts[: group.rank()])
    return slice(first, first + counts[group.rank()])
