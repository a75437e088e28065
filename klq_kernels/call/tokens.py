"""Data parallelism with a split head: the tokens come to the head, not the head to the tokens.

Each rank of a group has tokens of its own and some rows of the head. The valid tokens of all ranks, one rank's after
another's, make one packed batch, on which every rank does the work of its rows of the head (``vocabulary.sharded``).
So a whole weight, or a whole gradient of it, is nowhere; what moves is N H numbers of hidden states.

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

from ..vocabulary.collectives import all_gather
from .group import agree, dtypes_of
from .layout import Layout, valid_rows

PER_TOKEN = (
    "hidden", "actions", "values", "old_logp", "old_values", "advantages", "ref_logp", "rewards", "trace", "weights",
)  # fmt: skip
LAYOUT = ("mask", "cu_seqlens", "rows")
PER_SEQUENCE = ("scores", "bootstrap_values")


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
        everyones = agree(group, cu_seqlens.device, settings | {"given": shared}, (n, cu_seqlens.numel() - 1))
        self._counts, self._batches = ([row[i] for row in everyones] for i in (0, 1))
        lengths = _gather(cu_seqlens.diff(), self._batches, group)
        self._cu_seqlens = pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the operator on the batch.

        The gradient by a rank's hidden states and values is R times that of the batch.
        """
        own = self._own
        found = {name: self._rows(own[name]) for name in PER_TOKEN if own.get(name) is not None}
        found |= {name: self._sequences(own[name]) for name in PER_SEQUENCE if own.get(name) is not None}
        if own.get("denom") is not None:
            found["denom"] = own["denom"] * self._group.size()
        return {**own, **found, "mask": None, "rows": None, "cu_seqlens": self._cu_seqlens}

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
        return _gather(tensor.contiguous(), self._batches, self._group)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.mine, ctx.size = _place(counts, group), group.size()
        return _gather(own, counts, group)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None, None]:
        return by[ctx.mine] * ctx.size, None, None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return rows[_place(counts, group)].clone()

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None, None]:
        return _gather(by.contiguous(), ctx.counts, ctx.group) / ctx.group.size(), None, None


def _place(counts: list[int], group: dist.ProcessGroup) -> slice:
    first = sum(counts[: group.rank()])
    return slice(first, first + counts[group.rank()])


def _gather(own: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows, ``counts`` of them, one rank's after another's."""
    most = max(counts)
    padded = own.new_zeros(most, *own.shape[1:])
    padded[: own.shape[0]] = own
    return torch.cat([rows[:count] for rows, count in zip(all_gather(padded, group), counts, strict=True)])
