"""A run of one task over several shapes: memory, measurements, and where our own time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from . import memory
from .breakdown import breakdown
from .contenders.ours import NAME
from .harness import FLOOR, Progress, Record, measure
from .tasks import Task


def run_task(
    task: Task,
    shapes: list[Any],
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    with_memory: bool,
    limit: int | None,
    say: Progress,
    left_out: Mapping[str, str] = MappingProxyType({}),
    deadline: float = math.inf,
) -> list[Record]:
    """Memory first (on a CPU, a fresh process per contender), then all shapes; the loss gets its breakdown."""
    peaks: dict[str, list[int | str]] = {}
    if with_memory and device.type == "cpu":
        for contender in [c for c in task.contenders if c.missing(device) is None and c.name not in left_out]:
            say(f"{task.name}: memory of {contender.name}")
            peaks[contender.name] = memory.on_cpu(task.name, shapes, contender.name, limit)
    records = []
    for i, shape in enumerate(shapes):
        of_shape = {name: found[i] for name, found in peaks.items()}
        measured = measure(
            task, shape, device, rounds=rounds, seconds=seconds, peaks=of_shape, left_out=left_out, deadline=deadline,
            say=say,
        )  # fmt: skip
        if task.name == "loss":
            say(f"{task.name} {shape.name}: where the time goes")
            add_breakdown(task, shape, device, measured, rounds)
        records += measured
    return records


def add_breakdown(task: Task, shape: Any, device: torch.device, records: list[Record], rounds: int) -> None:
    """How our time divides between products, row kernels and the rest, if it and the floor were timed."""
    times = {record.name: record.time for record in records}
    ours, floor = times.get(NAME), times.get(FLOOR)
    if ours is not None and floor is not None:
        mine = next(record for record in records if record.name == NAME)
        mine.parts = breakdown(task.inputs(shape, device), ours, floor, rounds)
