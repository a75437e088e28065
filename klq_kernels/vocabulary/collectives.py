"""The collectives that the library uses, by the names that every supported PyTorch knows."""

from __future__ import annotations

from typing import Any

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
