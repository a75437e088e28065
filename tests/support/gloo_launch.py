"""Lets accelerate shard a model over processes of a CPU: it looks for FSDP on machines with accelerators alone."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
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
    if find_spec("deepspeed") is not None:  # on the path of those tests alone that need it
        suit_deepspeed()


def suit_deepspeed() -> None:
    """Makes DeepSpeed do with gloo.

    It would compile an all-reduce over shared memory first, a minute of C++. And where it gathers several weights it
    waits for the last of them alone: NCCL ends them in order, gloo does not, and unfinished ones were read as NaN.
    """
    ops, backend = import_module("deepspeed.ops"), import_module("deepspeed.comm.torch").TorchBackend
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gather = backend.all_gather_into_tensor

    def gather_and_wait(*args: Any, **kwargs: Any) -> Any:
        work = gather(*args, **kwargs)
        if work is not None:
            work.wait()
        return work

    backend.all_gather_into_tensor = gather_and_wait
