"""One job, in this process: train a policy, compare gradients or take times, and write what was measured as one file.

A result is written under another name and renamed, so that a file that exists is whole. It holds the job it belongs
to; where that is not the job asked for, because settings have changed since, it does not count.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .demo_loop import train_demo
from .equivalence import compare_gradients
from .methods import train_method
from .noise import measure_noise
from .spec import Job, Settings
from .timing import update_times
from .train import build_trainer, train


def run_job(job: Job, path: Path, warm: Path) -> None:
    """Runs a job and writes its result.

    Args:
        job: what to do.
        path: the file of the result.
        warm: a folder that keeps warm-started models.
    """
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.perf_counter()
    content = KINDS[job.kind](dict(job.settings), warm)
    content = {"job": asdict(job), **content, "seconds": time.perf_counter() - began}
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content) + "\n")
    os.replace(unfinished, path)


def result(job: Job, path: Path) -> dict[str, Any] | None:
    """The result that this job has written, or None."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if content.get("job") == asdict(job) else None


def gradients(settings: Settings, warm: Path) -> dict[str, Any]:
    """How far the gradients of KLQ are from those of PPO-penalty, on a rollout of the task's policy."""
    alphas = settings.pop("alphas")
    with tempfile.TemporaryDirectory() as folder:
        trainer, _, rows = build_trainer(settings, warm, folder)
        return compare_gradients(trainer, rows, alphas)


KINDS: dict[str, Callable[[Settings, Path], dict[str, Any]]] = {
    "train": train,
    "gradients": gradients,
    "timing": update_times,
    "noise": measure_noise,
    "demo": train_demo,
    "methods": train_method,
}
