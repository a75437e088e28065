"""What fits: the largest batch or length, and where nothing does, the one option whose change helps most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ...call.checks import require
from .memory import plan
from .run import Run
from .shapes import Model

MOST_GPUS = 65_536  # no larger machine is looked for


class Change(NamedTuple):
    """One option changed, and the bytes of a step of one sequence with it."""

    option: str
    total: int


def most(fits: Callable[[int], bool]) -> int:
    """The largest count that fits, 0 where not even 1 does; ``fits`` must be monotone."""
    if not fits(1):
        return 0
    high = 1
    while fits(high * 2):
        high *= 2
    low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def total(model: Model, run: Run, *, fused: bool = True) -> int:
    """Bytes of a step on a rank."""
    found = plan(model, run)
    return found.total(found.fused if fused else found.naive)


def largest(model: Model, run: Run, budget: int, *, fused: bool, axis: str) -> int:
    """The largest ``batch``, or ``length`` (response growing in proportion), whose step fits ``budget`` bytes."""
    require(axis in ("batch", "length"), "axis", f"must be batch or length, got {axis!r}")

    def fits(count: int) -> bool:
        if axis == "batch":
            tried = run._replace(batch=count)
        else:
            length = count * run.cp
            tried = run._replace(length=length, response=max(math.ceil(length * run.response / run.length), 1))
        return total(model, tried, fused=fused) <= budget

    return most(fits) * (1 if axis == "batch" else run.cp)


def changes(run: Run) -> Iterator[tuple[str, Run]]:
    """Runs that differ from this one in one option, each as its flags say it; some may be impossible."""
    shards = ("fsdp2", "zero3") if run.copies > 1 else ()
    yield from ((f"--shard {name}", run._replace(shard=name)) for name in shards if name != run.shard)
    if not run.checkpointing:
        yield "--checkpointing", run._replace(checkpointing=True)
    yield from ((f"--tp {2**k}", run._replace(tp=2**k)) for k in range(1, 4) if 2**k > run.tp)
    yield from ((f"--cp {2**k}", run._replace(cp=2**k)) for k in range(1, 4) if 2**k > run.cp)
    yield "--head split", run._replace(head="split")
    if not run.lora:
        held = None if run.models in (None, 2) else run.models
        yield "--lora-rank 16", run._replace(lora=16, models=held, ref_dtype=None, ref_placement=None)
    yield from (
        (f"--ref-placement {place}", run._replace(ref_placement=place))
        for place in ("sharded", "cpu")
        if place != run.placement
    )
    if (run.ref_dtype or run.stored) == torch.float32 != run.dtype:
        yield "--ref-dtype " + str(run.dtype).removeprefix("torch."), run._replace(ref_dtype=run.dtype)
    if not run.offload_optimizer:
        yield "--offload-optimizer", run._replace(offload_optimizer=True)
    if run.optimizer == "adamw":
        yield "--optimizer adamw-8bit", run._replace(optimizer="adamw-8bit")
    length = run.length // 2
    if length >= run.cp:
        yield f"--length {length}", run._replace(length=length, response=max(run.response // 2, 1))


def advice(model: Model, run: Run) -> list[Change]:
    """The best possible change of each option that lowers the bytes of a step of one sequence, best first."""
    run = run._replace(batch=1)
    now, found = total(model, run), dict[str, Change]()
    for option, changed in changes(run):
        try:
            size = total(model, changed)
        except ValueError:  # impossible with the other options
            continue
        flag = option.split()[0]
        if size < min(now, found[flag].total if flag in found else now):
            found[flag] = Change(option, size)
    return sorted(found.values(), key=lambda change: change.total)


def fewest_gpus(model: Model, run: Run, budget: int) -> int | None:
    """The smallest number of GPUs, doubled from the present one, on which a step of one sequence fits under FSDP2."""
    tried = run._replace(batch=1, shard="fsdp2", offload_optimizer=False)
    while tried.gpus <= MOST_GPUS:
        if total(model, tried) <= budget:
            return tried.gpus
        tried = tried._replace(gpus=2 * tried.gpus)
    return None
