"""The demonstration's loop as a job: its policy shares a backbone with V, and learns at five times the rate."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..demo import policy, task
from ..demo.train import Learner, train
from ..demo.train import Settings as LoopSettings
from ..demo.walkthrough import Size, batches, evaluate
from .spec import Settings
from .train import DENSE

CURVES = ("reward", "kl", "entropy", "explained_variance", "length")
HELD_OUT = ("reward", "kl", "length", "truncated")


def train_demo(settings: Settings, warm: Path) -> dict[str, Any]:
    """Held-out results before and after, and the curves; ``warm`` keeps the warm-started policy of each seed."""
    seed, steps, samples = settings["seed"], settings["steps"], settings["samples"]
    loop = LoopSettings(tau=settings["tau"], batch=settings["batch"])
    if samples != DENSE:
        loop = LoopSettings(tau=loop.tau, batch=loop.batch, gradient="sampled", samples=samples)
    size = Size(settings=loop, held_out=settings["eval_size"], warm_steps=settings["warm_steps"])
    torch.manual_seed(seed)
    tokenizer = task.build_tokenizer(prompt + summary for prompt, summary in islice(task.examples("tokenizer"), 2000))
    model = policy.build_model(tokenizer)
    for _ in policy.warm_start(model, tokenizer, seed=seed, steps=size.warm_steps):
        pass
    learner = Learner(model, loop)
    torch.manual_seed(seed)
    before = evaluate(learner, tokenizer, size)
    history = list(train(learner, tokenizer, islice(batches(seed, loop.batch), steps)))
    torch.manual_seed(seed)
    after = evaluate(learner, tokenizer, size)
    curves = {name: [entry[name] for entry in history] for name in CURVES}
    return {
        "before": {name: before[name] for name in HELD_OUT},
        "after": {name: after[name] for name in HELD_OUT},
        "curves": {"step": list(range(1, steps + 1))} | curves,
    }
