"""Shared by all launchers: the block sizes, and the device the tensors live on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class Config(NamedTuple):
    """Constexpr sizes of a kernel and its warps. One per kernel: these are bandwidth-bound and not fussy."""

    sizes: dict[str, int]
    num_warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Of the launch. Contraction of products and sums is asked for: the default depends on Triton's version."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


# A row program streams tiles of GROUPS x LANES logits; each thread owns 8 neighbouring lanes (16 bytes of bf16) in each
# of the GROUPS, so maxima and sums stay in its registers until the end of the row. By bytes per logit.
ROW_STATS = {
    2: Config({"GROUPS": 8, "LANES": 1024}, num_warps=4),
    4: Config({"GROUPS": 4, "LANES": 1024}, num_warps=4),
}
# The same tiles for the normalisers of the two rows, then BLOCK logits of each at a time.
ROW_KL = {
    size: Config({**config.sizes, "BLOCK": 2048}, num_warps=config.num_warps) for size, config in ROW_STATS.items()
}
ROW_GRAD = Config({"BLOCK": 4096}, num_warps=4)
# 512 rows of 128k logits are 256 programs, two for each multiprocessor of a large GPU. Not timed: of five shapes,
# blocks of 1024 to 4096 on 2 to 8 warps, this one alone spills nothing on any target of the static gate.
ROW_GRAD_SUMS = Config({"ROWS": 64, "BLOCK": 4096}, num_warps=8)
ROW_KL_GRAD = Config({"BLOCK": 2048}, num_warps=4)  # of two rows
# As many threads as a multiprocessor takes in one program, so that only one row of each is in flight.
ROW_UPDATE = Config({"GROUPS": 4, "LANES": 8192, "BLOCK": 16384}, num_warps=32)
ROW_SELECT = Config({"GROUPS": 8, "SEGMENT": 256, "BLOCK": 512, "HITS": 4}, num_warps=4)
WEIGHTED_SUMS = Config({"ENTRIES": 4, "BLOCK": 1024}, num_warps=4)
# By bytes per element of the weight.
SELECTED_LOGITS = {
    2: Config({"ENTRIES": 16, "BLOCK": 256}, num_warps=4),
    4: Config({"ENTRIES": 16, "BLOCK": 128}, num_warps=4),
}
KLQ_RESIDUAL = Config({"BLOCK": 1024}, num_warps=4)
KLQ_METRICS = Config({"BLOCK": 2048}, num_warps=8)
SCALE = Config({"BLOCK": 8192}, num_warps=8)
SCAN = Config({"TILE": 1024, "SLOTS": 128}, num_warps=4)


def require_contiguous(*tensors: Tensor | None) -> None:
    """Raises RuntimeError where the elements of a tensor are not side by side in memory, as a kernel that is told no
    stride takes them to be.
    """
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise RuntimeError(f"a kernel takes contiguous tensors; got strides {tensor.stride()}")


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU current: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
