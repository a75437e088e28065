"""Lets accelerate shard a model over processes of a CPU: it looks for FSDP on machines with accelerators alone."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers.training_args as training_args
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def pose_as_accelerators() -> None:
    """Makes the CPU pass for a GPU and gloo for NCCL, in a launched process, before anything of accelerate runs."""

    def backend(self: PartialState, *_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    assert "LOCAL_RANK" in os.environ, "start it by torchrun"
    PartialState._prepare_backend = backend
    PartialState.set_device = device
    training_args.is_torch_bf16_gpu_available = lambda: True
