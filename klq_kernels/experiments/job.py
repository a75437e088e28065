"""One job, in this process: train a policy (or compare gradients), and write what was measured as one file.

A result is written under another name and renamed, so that a file that exists is whole. It holds the job it belongs
to; where that is not the job asked for, because settings have changed since, it does not count.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PrinterCallback
from transformers.utils import logging

from ..tasks import Task, load_task, warm_started
from ..trainer import KLQConfig, KLQTrainer
from ..trainer.run import answers
from .equivalence import compare_gradients
from .spec import Job, Settings

CURVES = {
    "reward": "objective/scores",
    "kl": "objective/kl",
    "entropy": "policy/entropy_avg",
    "explained_variance": "val/explained_variance",
    "length": "completions/mean_length",
}
WARM_UP = 1  # cycles whose times do not count


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
    """What this very job has written, or None."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if content.get("job") == asdict(job) else None


def build_trainer(settings: Settings, warm: Path, folder: str) -> tuple[KLQTrainer, Task, list[dict[str, Any]]]:
    """(trainer, task, held-out rows) of a job; the policy, its reference and V start from the same warm start."""
    task = load_task(settings.pop("task"))
    held_out = task.dataset("eval", settings.pop("eval_size"))
    policy = warm_started(task, steps=settings.pop("warm_steps", None), cache=warm)
    value = copy.deepcopy(policy) if settings.pop("value_model", None) == "copy" else None
    config = KLQConfig(
        folder,
        **settings,
        max_completion_length=task.max_completion_length,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        watch_failures=False,
    )
    trainer = KLQTrainer(
        policy,
        list(task.reward_funcs),
        config,
        train_dataset=task.dataset("train", config.total_episodes or 64, seed=1 + config.seed),
        eval_dataset=held_out,
        processing_class=task.tokenizer(),
        value_model=value,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, task, list(held_out)


def train(settings: Settings, warm: Path) -> dict[str, Any]:
    """Held-out results before and after, the curves, what the judge says of each completion, seconds per update."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, task, rows = build_trainer(settings, warm, folder)
        before = held_out(trainer)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
        texts = answers(trainer, rows, 0)
        return {
            "before": before,
            "after": held_out(trainer),
            "curves": {"step": [e["step"] for e in logs]} | {n: [e[key] for e in logs] for n, key in CURVES.items()},
            "judged": [task.judge(row["prompt"], text, row) for row, text in zip(rows, texts, strict=True)],
            "update_seconds": fmean(e["time/update"] for e in logs[WARM_UP:] or logs) / trainer.args.steps_per_cycle,
        }


def held_out(trainer: KLQTrainer) -> dict[str, float]:
    found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in ("reward", "kl", "length", "truncated")}


def gradients(settings: Settings, warm: Path) -> dict[str, Any]:
    """How far the gradients of KLQ are from those of PPO-penalty, on a rollout of the task's policy."""
    alphas = settings.pop("alphas")
    with tempfile.TemporaryDirectory() as folder:
        trainer, _, rows = build_trainer(settings, warm, folder)
        return compare_gradients(trainer, rows, alphas)


KINDS: dict[str, Callable[[Settings, Path], dict[str, Any]]] = {"train": train, "gradients": gradients}
