"""A training run as a job: a small policy, a task, and what is measured of it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from ...trainer import KLQConfig, KLQTrainer, QSharpTrainer
from ...trainer.evaluation import answers
from ..tasks import Task, load_task, warm_started
from .optimizers import optimizer_for
from .spec import Settings
from .stale import StaleEngine

DENSE = "dense"  # in place of a number of samples
CURVES = {  # those that a run logs
    "reward": "objective/scores",
    "kl": "objective/kl",
    "entropy": "policy/entropy_avg",
    "explained_variance": "val/explained_variance",
    "length": "completions/mean_length",
    "sampler_kl": "rollout/sampler_kl",
    "ess": "rollout/ess",
}


def build_trainer(settings: Settings, warm: Path, folder: str) -> tuple[KLQTrainer, Task, list[dict[str, Any]]]:
    """(trainer, task, held-out rows) of a job; the policy, its reference and V start from the same warm start."""
    task = load_task(settings.pop("task"))
    held_out = task.dataset("eval", settings.pop("eval_size"))
    policy = warm_started(task, steps=settings.pop("warm_steps", None), cache=warm)
    value = copy.deepcopy(policy) if settings.pop("value_model", None) == "copy" else None
    samples = settings.pop("samples", DENSE)
    if samples != DENSE:
        settings |= {"head_gradient": "sampled", "head_samples": samples}
    staleness = settings.pop("staleness", None)
    optimizer, rate = settings.pop("optimizer", "adamw"), settings.pop("sgd_learning_rate", None)
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
        rollout_func=None if staleness is None else StaleEngine(policy, staleness),
    )
    trainer.remove_callback(PrinterCallback)
    if optimizer != "adamw":
        trainer.optimizer = optimizer_for(optimizer, trainer, rate)
    return trainer, task, list(held_out)


def train(settings: Settings, warm: Path) -> dict[str, Any]:
    """Held-out results before and after, the curves, and what the judge says of each held-out completion."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, task, rows = build_trainer(settings, warm, folder)
        before = held_out(trainer)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
        texts = answers(trainer, rows, 0)
        curves = {name: [e[key] for e in logs] for name, key in CURVES.items() if key in logs[0]}
        return {
            "before": before,
            "after": held_out(trainer),
            "curves": {"step": [e["step"] for e in logs]} | curves,
            "judged": [task.judge(row["prompt"], text, row) for row, text in zip(rows, texts, strict=True)],
        }


def held_out(
    trainer: KLQTrainer | QSharpTrainer, names: Sequence[str] = ("reward", "kl", "length", "truncated")
) -> dict[str, float]:
    found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in names}
