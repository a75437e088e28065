"""The end of a run that has several processes."""

from __future__ import annotations

import gc

import torch.distributed as dist


def leave_process_group() -> None:
    """Ends the threads of the process group; for the end of a script, once its trainer is out of scope.

    ``destroy_process_group`` alone forgets the group, whose threads go on for as long as anything refers to it (a model
    in DDP, which is part of a cycle, does). One of gloo's that still holds a tensor while the interpreter shuts down
    aborts the process, after a run in which nothing was wrong ("terminate called without an active exception",
    pytorch/pytorch#190489).
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
