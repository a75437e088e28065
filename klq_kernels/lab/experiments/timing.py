"""How long an optimizer step takes, for KLQ and for PPO: both in one process, step by step in turns, on one batch.

Wall-clock times of runs that share a machine say more of the machine than of the algorithm. Taking turns, both meet the
same disturbances, and the median drops what is left of them; the CPU time beside it counts no waiting at all.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...trainer import KLQTrainer
from .spec import Settings
from .train import build_trainer

WARM_UP = 2  # steps of each that do not count


def update_times(settings: Settings, warm: Path) -> dict[str, Any]:
    """``{algorithm: {"wall": [ms, ...], "cpu": [ms, ...], "median_wall": ms, "median_cpu": ms}}``, and the tokens."""
    rounds = settings.pop("rounds")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: Step({**settings, "algorithm": name}, warm, folder) for name in ("klq", "ppo")}
        for _ in range(WARM_UP):
            for step in steps.values():
                step()
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                taken[name].append(step())
    for name, times in taken.items():
        wall, cpu = ([1000 * seconds for seconds in column] for column in zip(*times, strict=True))
        found[name] = {"wall": wall, "cpu": cpu, "median_wall": median(wall), "median_cpu": median(cpu)}
    return {"times": found, "rounds": rounds, "tokens": steps["klq"].tokens}


class Step:
    """An optimizer step on a mini-batch, as a trainer takes it; calling it returns (wall, CPU) seconds."""

    def __init__(self, settings: Settings, warm: Path, folder: str) -> None:
        self.trainer: KLQTrainer = build_trainer(settings, warm, folder)[0]
        self.trainer.create_optimizer()
        size = self.trainer.args.per_device_train_batch_size
        rows: Any = self.trainer.train_dataset
        experience = self.trainer.collect([rows[i] for i in range(size)])
        self.tokens = int(experience.rows.sum())
        self.inputs = (experience.select(torch.arange(size)), torch.tensor(float(self.tokens)), 0)

    def __call__(self) -> tuple[float, float]:
        model: Any = self.trainer.model
        optimizer: Any = self.trainer.optimizer
        wall, cpu = time.perf_counter(), time.process_time()
        self.trainer.compute_loss(model, self.inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - wall, time.process_time() - cpu
