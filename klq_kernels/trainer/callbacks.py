"""A callback that warns of the signatures of known failures.

Each failure is a question asked of the last logs; the answer is what was seen, or None. The table at the end pairs the
questions with advice. A warning is given once per failure and run.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import KLQConfig

logger = logging.getLogger(__name__)

Logs = dict[str, float]
WINDOW = 8  # logs; with the default of one log per cycle, cycles
SAMPLER_KL = 0.1  # nats per token between the policy that samples and the one that learns
STALENESS = 4  # cycles, of samplers that do not say how far off they are


class Window(NamedTuple):
    """The last logs of a run, and its first."""

    recent: list[Logs]
    first: Logs
    config: KLQConfig

    def mean(self, name: str) -> float:
        return fmean(logs.get(name, 0.0) for logs in self.recent)

    def rises(self, name: str, factor: float = 1.0) -> bool:
        return self.recent[-1].get(name, 0.0) > factor * self.recent[0].get(name, 0.0)

    @property
    def score_gain(self) -> float:
        """By how many of their own spreads scores are better than at the start."""
        return (self.mean("objective/scores") - self.first["objective/scores"]) / max(
            self.mean("objective/scores_std"), 1e-8
        )


def not_a_number(seen: Window) -> str | None:
    """The loss alone does not tell: transformers logs it without the steps at which it was not a number."""
    watched = ["loss", "loss/residual_rms", "loss/policy_avg", "loss/value_avg", "objective/scores", "objective/kl"]
    if not seen.config.fp16:  # whose loss scaler is meant to overflow now and then
        watched.append("grad_norm")
    bad = [name for name in watched if not abs(seen.recent[-1].get(name, 0.0)) < 1e30]
    return ", ".join(bad) or None


def unscaled_scores(seen: Window) -> str | None:
    """Scores so large that the squared loss is, and the price of KL is nothing beside them."""
    logs = seen.recent[-1]
    size = max(abs(logs.get(f"objective/{name}", 0.0)) for name in ("scores", "scores_std"))
    size = min(size / logs.get("objective/reward_scale", 1.0), seen.config.reward_clip or size)
    return f"scores of {size:.3g}" if size > 100 else None


def everything_truncated(seen: Window) -> str | None:
    """No completion of a cycle has ended, and what does not end bootstraps from V instead of being scored."""
    cut = seen.recent[-1].get("completions/truncated", 0.0)
    return "no completion ended" if seen.config.bootstrap_truncated and cut == 1.0 else None


def kl_explosion(seen: Window) -> str | None:
    """KL costs more than twice what scores differ by, and still rises."""
    kl, spread = seen.mean("objective/kl"), seen.mean("objective/scores_std")
    cost = seen.config.tau * kl * fmean(logs.get("objective/reward_scale", 1.0) for logs in seen.recent)
    explodes = cost > 2 * max(spread, 0.05) and seen.rises("objective/kl")
    return f"{kl:.1f} nats cost {cost:.2f}, scores differ by {spread:.2f}" if explodes else None


def kl_collapse(seen: Window) -> str | None:
    """Scores differ, and still the policy does not leave its reference."""
    kl, spread = seen.mean("objective/kl"), seen.mean("objective/scores_std")
    return f"{kl:.1e} nats" if abs(kl) < 1e-4 and spread > 1e-3 else None


def value_divergence(seen: Window) -> str | None:
    """V explains less than nothing and its error grows (returns that hardly vary are hard to explain: no failure)."""
    error = "loss/residual_rms" if "loss/residual_rms" in seen.first else "loss/value_avg"
    explained = seen.mean("val/explained_variance")
    return f"explained variance {explained:.2f}" if explained < -0.5 and seen.rises(error, 1.2) else None


def length_collapse(seen: Window) -> str | None:
    """Completions have become very short, and scores are no better for it."""
    began, length = seen.first["completions/mean_length"], seen.mean("completions/mean_length")
    return f"{began:.0f} tokens have become {length:.1f}" if length < began / 4 and seen.score_gain <= 1 else None


def no_score(seen: Window) -> str | None:
    """Nearly everything is cut off, and bootstraps from V instead of being scored."""
    cut = seen.mean("completions/truncated")
    return f"{cut:.0%} of the completions are cut off" if seen.config.bootstrap_truncated and cut > 0.9 else None


def entropy_collapse(seen: Window) -> str | None:
    """The policy has become deterministic, and explores no more."""
    entropy = seen.mean("policy/entropy_avg")
    return f"{entropy:.3f} nats per token" if entropy < 0.02 < seen.first.get("policy/entropy_avg", 0.0) else None


def reward_hacking(seen: Window) -> str | None:
    """A hint only: scores have risen while completions went to an extreme of length."""
    began, length = seen.first["completions/mean_length"], seen.mean("completions/mean_length")
    cap = 0.98 * seen.config.max_completion_length
    extreme = (length > cap and began < 0.9 * cap) or length < 2 < began
    return f"scores rose while completions became {length:.1f} tokens long" if extreme and seen.score_gain > 1 else None


def stale_sampler(seen: Window) -> str | None:
    """The policy that samples has drifted from the one that learns, and nothing corrects for it."""
    if seen.config.off_policy != "none":
        return None
    logs = seen.recent[-1]
    drift, age = logs.get("rollout/sampler_kl"), logs.get("rollout/staleness", 0.0)
    if drift is None:
        return f"weights {age:.1f} cycles old" if age > STALENESS else None
    return f"{drift:.2g} nats per token from the policy that learns" if drift > SAMPLER_KL else None


class Failure(NamedTuple):
    """A question and what to try where the answer is not None; ``at_once``: needs no full window."""

    ask: Callable[[Window], str | None]
    advice: str
    at_once: bool = False


FAILURES = {
    "not a number": Failure(
        not_a_number, "Lower the learning rate; check the reward functions; use bf16 rather than fp16", at_once=True
    ),
    "scores out of scale": Failure(
        unscaled_scores, "Scale the rewards to about 1 (reward_weights), since tau prices KL in units of reward", True
    ),
    "everything is truncated": Failure(
        everything_truncated,
        "Raise max_completion_length, or set bootstrap_truncated to False or missing_eos_penalty: nothing is learnt of "
        "scores now",
        True,
    ),
    "stale samples": Failure(
        stale_sampler,
        "Set off_policy='retrace', lower the learning rate or num_update_epochs, or give the engine the policy's "
        "weights more often (with async_rollouts it is a cycle behind)",
        True,
    ),
    "KL explosion": Failure(kl_explosion, "Lower the learning rate or num_update_epochs, or raise tau"),
    "KL collapse": Failure(kl_collapse, "Raise the learning rate, or lower tau"),
    "value divergence": Failure(value_divergence, "Change value_learning_rate, or use loss_type huber"),
    "length collapse": Failure(length_collapse, "Check that an empty completion earns little; raise tau"),
    "no score gets through": Failure(
        no_score, "Raise max_completion_length, set missing_eos_penalty, or set bootstrap_truncated to False"
    ),
    "entropy collapse": Failure(entropy_collapse, "Raise tau, or lower the learning rate"),
    "reward hacking?": Failure(reward_hacking, "Read some completions (log_completions); score what the length buys"),
}


class FailureWatch(TrainerCallback):
    """Warns of each of ``FAILURES`` once, with what was seen and what to try. ``warned`` lists them: name, words."""

    def __init__(self, config: KLQConfig) -> None:
        self._config = config
        self._recent: deque[Logs] = deque(maxlen=WINDOW)
        self._first: Logs | None = None
        self.warned: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        of_cycle = "objective/kl" in logs  # logs between the rollouts of a run that logs every step have only losses
        if of_cycle:
            self._first = self._first or logs
            self._recent.append(logs)
        recent = list(self._recent) if of_cycle else [*self._recent, logs]
        window = Window(recent, self._first or logs, self._config)
        for name, failure in FAILURES.items():
            full = of_cycle and len(self._recent) == WINDOW
            if name in self.warned or not (failure.at_once or full):
                continue
            seen = failure.ask(window)
            if seen is not None:
                self.warned[name] = seen
                if state.is_world_process_zero:
                    logger.warning("step %d: %s (%s). %s.", state.global_step, name, seen, failure.advice)
