"""Runs on several processes: shares in the work on held-out rows, failing together, the end of the process group."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from accelerate.utils import gather_object

from ..engines import EngineError, WeightsLost


class Turn(NamedTuple):
    """A batch of rows that a process works on, and whether it keeps what comes of it."""

    rows: range
    kept: bool


def turns(number: int, batch: int, *, process: int, processes: int) -> list[Turn]:
    """The share of one process in ``number`` rows.

    Batches go round the processes whole, so what is sampled for a row does not depend on how many processes there are.
    Each process has as many turns, because none can run a sharded model alone: where the batches do not go round, the
    last to come keep the others company with the first batch again, and drop the result.
    """
    batches = [range(begin, min(begin + batch, number)) for begin in range(0, number, batch)]
    mine = range(process, math.ceil(len(batches) / processes) * processes, processes)
    return [Turn(batches[i], True) if i < len(batches) else Turn(batches[0], False) for i in mine]


@contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """Where one process raises inside, all raise: one that stopped alone would leave the others waiting for it.

    Every process must enter it, and call nothing inside that waits for the others. It also makes each wait for all.

    Raises:
        WeightsLost: where that is what all that failed raised.
        EngineError: where all went well here, or the weights were lost, and something else happened elsewhere.
        Exception: what was raised here, otherwise.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if accelerator.num_processes > 1:
        told = None if error is None else (isinstance(error, WeightsLost), f"{type(error).__name__}: {error}")
        failed = {rank: said for rank, said in enumerate(gather_object([told])) if said is not None}
        kind = WeightsLost if all(lost for lost, _ in failed.values()) else EngineError
        if failed and (error is None or isinstance(error, WeightsLost)):
            told_by_all = "; ".join(f"process {rank} failed with {text}" for rank, (_, text) in failed.items())
            raise kind(told_by_all) from error
    if error is not None:
        raise error


def anywhere(accelerator: Any, here: bool) -> bool:
    """Whether it is so in any process; every process must ask."""
    return here if accelerator.num_processes == 1 else any(gather_object([here]))


def leave_process_group() -> None:
    """Ends the threads of the process group; for the end of a script, once its trainer is out of scope.

    One of gloo's threads that still holds a tensor while the interpreter shuts down aborts the process, after a run in
    which nothing was wrong ("terminate called without an active exception", pytorch/pytorch#190489). They end with the
    last reference to the group, and a model in DDP, which is part of a cycle, has one. It has to go first: the garbage
    collector would wait for the threads with the interpreter's lock held, which they may be waiting for, whereas
    ``destroy_process_group`` drops what Python holds without it. Meshes of sharded weights have references as well, and
    caches of DTensor keep the meshes for ever.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        for mesh in (held for held in gc.get_objects() if type(held) is dist.device_mesh.DeviceMesh):
            getattr(mesh, "_pg_registry", {}).clear()
        dist.destroy_process_group()
