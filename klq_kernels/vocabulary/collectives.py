"""The collectives that the library uses, by the names that every supported PyTorch knows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]: every rank's tensor, all of one shape and dtype."""
    everyones = mine.new_empty(group.size(), *mine.shape)
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    gather(everyones.view(-1), mine.reshape(-1), group=group)
    return everyones


def add_up(total: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Starts to replace a tensor by the sum of all ranks' ones; wait for it before it is read."""
    running = dist.all_reduce(total, group=group, async_op=True)
    assert running is not None
    return running


def gather_rows(own: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows, ``counts`` of them, one rank's after another's."""
    most = max(counts)
    padded = own.new_zeros(most, *own.shape[1:])
    padded[: own.shape[0]] = own
    return torch.cat([rows[:count] for rows, count in zip(all_gather(padded, group), counts, strict=True)])


def add_up_rows(everyones: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's rows, ``counts`` of them, of the sum over ranks of a tensor that has those of all."""
    most, parts = max(counts), everyones.split(counts)
    if min(counts) < most:
        padded = everyones.new_zeros(len(counts), most, *everyones.shape[1:])
        for place, part in zip(padded, parts, strict=True):
            place[: part.shape[0]] = part
        everyones = padded
    mine = parts[0].new_empty(most, *parts[0].shape[1:])
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
    scatter(mine.view(-1), everyones.reshape(-1), group=group)
    return mine[: counts[group.rank()]]
