"""A guide for a policy that stays as it is, beside policies that are trained, from one start: reward against KL.

A job is one method and one seed. A guide (``bernoulli``, ``categorical``; ``cd``, controlled decoding by the mean) is
trained once and measured at several prices eta. A policy (``klq``, ``ppo``, ``reinforce``: PPO's loss once per rollout,
by the score alone less the mean of the prompt's others) is trained once for each price tau.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from ...trainer import KLQConfig, KLQTrainer, QSharpConfig, QSharpTrainer
from ..tasks import Task, load_task, warm_started
from .spec import Settings
from .train import held_out

LAWS = {"bernoulli": "bernoulli", "categorical": "categorical", "cd": "mse"}
POLICIES: dict[str, Settings] = {
    "klq": {"algorithm": "klq"},
    "ppo": {"algorithm": "ppo"},
    "reinforce": {
        "algorithm": "ppo", "num_update_epochs": 1, "lam": 1.0, "vf_coef": 0.0, "num_generations": 4,
    },
}  # fmt: skip
QUIET: Settings = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": []}
MEASURED = ("reward", "kl", "length")


def train_method(settings: Settings, warm: Path) -> dict[str, Any]:
    """Held-out results before and after, at each price (``front``), and curves of those at the last."""
    method, task = settings["method"], load_task(settings["task"])
    reference = warm_started(task, steps=settings.get("warm_steps"), cache=warm)
    with tempfile.TemporaryDirectory() as folder:
        if method in LAWS:
            return guided(task, reference, settings, folder)
        return trained(task, reference, settings, folder)


def own(settings: Settings) -> Settings:
    """What this method alone has of options."""
    found: Settings = settings.get("own", {}).get(settings["method"], {})
    return found


def guided(task: Task, reference: Any, settings: Settings, folder: str) -> dict[str, Any]:
    """A guide, measured at each eta."""
    options = {**settings["guide"], **own(settings)}
    args = QSharpConfig(
        folder, law=LAWS[settings["method"]], seed=settings["seed"], eta=settings["etas"][-1],
        max_completion_length=task.max_completion_length, eval_strategy="steps", eval_on_start=True, **options, **QUIET,
    )  # fmt: skip
    prompts = (options.get("prompts_per_round") or 256) * args.rounds
    trainer = QSharpTrainer(
        reference,
        list(task.reward_funcs),
        args,
        train_dataset=task.dataset("train", prompts, seed=1 + settings["seed"]),
        eval_dataset=task.dataset("eval", settings["eval_size"]),
        processing_class=task.tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    front = []
    for eta in settings["etas"]:
        trainer.args.eta = eta
        front.append({"price": eta, **held_out(trainer, MEASURED)})
    return {
        "before": {"reward": logs[0]["eval_ref_reward"]},
        "after": front[-1],
        "front": front,
        "curves": {"step": [e["step"] for e in logs]} | {n: [e[f"eval_{n}"] for e in logs] for n in ("reward", "kl")},
    }


def trained(task: Task, reference: Any, settings: Settings, folder: str) -> dict[str, Any]:
    """Policies trained at each tau."""
    front: list[dict[str, float]] = []
    before: dict[str, float] = {}
    curves: dict[str, Any] = {}
    for tau in settings["taus"]:
        options = {**settings["policy"], **POLICIES[settings["method"]], **own(settings)}
        args = KLQConfig(
            folder, tau=tau, seed=settings["seed"], max_completion_length=task.max_completion_length,
            watch_failures=False, **options, **QUIET,
        )  # fmt: skip
        policy = copy.deepcopy(reference)
        trainer = KLQTrainer(
            policy,
            list(task.reward_funcs),
            args,
            train_dataset=task.dataset("train", args.total_episodes or 64, seed=1 + settings["seed"]),
            eval_dataset=task.dataset("eval", settings["eval_size"]),
            processing_class=task.tokenizer(),
            value_model=copy.deepcopy(reference),
        )
        trainer.remove_callback(PrinterCallback)
        before = before or held_out(trainer, MEASURED)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
        front.append({"price": tau, **held_out(trainer, MEASURED)})
        names = {"reward": "objective/scores", "kl": "objective/kl"}
        curves = {"step": [e["step"] for e in logs]} | {n: [e[key] for e in logs] for n, key in names.items()}
    return {"before": before, "after": front[-1], "front": front, "curves": curves}
