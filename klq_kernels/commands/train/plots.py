"""The picture of a run: its curves, and the reward it bought with the KL it spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ...lab.display import BLUE, GREEN, GREY, ORANGE, RED, finish, moving_mean

CURVES = (
    ("objective/scores", "Reward", "mean score", BLUE),
    ("objective/kl", "KL to the reference", "nats per completion", RED),
    ("policy/entropy_avg", "Entropy", "nats per token", GREEN),
    ("val/explained_variance", "Returns explained by V", "share of variance", GREEN),
    ("completions/mean_length", "Length", "tokens per completion", GREEN),
)


def plot_run(history: list[dict[str, Any]], path: Path, *, tau: float, window: int = 5) -> None:
    """Draws what a trainer logged.

    Args:
        history: ``trainer.state.log_history``; entries without the reward (evaluations, the last summary) are skipped.
        path: where the PNG goes.
        tau: price of a nat of KL, for the lines of equal regularised reward.
        window: how many logs the smooth curves average.
    """
    logs = [entry for entry in history if "objective/scores" in entry]
    steps = [entry["step"] for entry in logs]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    panels: list[Axes] = list(axes.flat)
    for panel, (name, title, unit, colour) in zip(panels, CURVES, strict=False):
        numbers = [entry[name] for entry in logs]
        panel.plot(steps, numbers, ".", color=colour, alpha=0.35, label="each log")
        panel.plot(steps, moving_mean(numbers, window), color=colour, linewidth=2, label=f"mean of the last {window}")
        panel.set(title=title, xlabel="optimizer steps", ylabel=unit)
    panels[0].legend(frameon=False)
    panels[3].axhline(0, color=GREY, linewidth=1)
    _reward_against_kl(panels[5], logs, tau, window)
    finish(figure, path, *panels)


GUIDE_CURVES = (
    ("loss", "Loss of the guide", "mean of a sequence's tokens", BLUE),
    ("guide/explained_variance", "Rewards explained by the guide", "share of variance", GREEN),
)


def plot_guide(history: list[dict[str, Any]], path: Path, *, window: int = 5) -> None:
    """Draws what the trainer of a guide logged: its loss, what it explains, and evaluations where there were any.

    Args:
        history: ``trainer.state.log_history``.
        path: where the PNG goes.
        window: how many logs the smooth curves average.
    """
    logs = [entry for entry in history if "round" in entry]
    steps = [entry["step"] for entry in logs]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for panel, (name, title, unit, colour) in zip(axes, GUIDE_CURVES, strict=False):
        numbers = [entry[name] for entry in logs]
        panel.plot(steps, numbers, ".", color=colour, alpha=0.35, label="each log")
        panel.plot(steps, moving_mean(numbers, window), color=colour, linewidth=2, label=f"mean of the last {window}")
        panel.set(title=title, xlabel="optimizer steps", ylabel=unit)
    axes[0].legend(frameon=False)
    measured = [entry for entry in history if "eval_reward" in entry]
    for name, label, colour in (("eval_reward", "guided", BLUE), ("eval_ref_reward", "reference", GREY)):
        axes[2].plot([e["step"] for e in measured], [e[name] for e in measured], "o-", color=colour, label=label)
    axes[2].set(title="Held-out prompts", xlabel="optimizer steps", ylabel="mean score")
    axes[2].legend(frameon=False)
    finish(figure, path, *axes)


def _reward_against_kl(axes: Axes, logs: list[dict[str, Any]], tau: float, window: int) -> None:
    """Each log as a point, later ones darker; the way they went; and where reward - tau KL is what it is at the end."""
    kl, reward = ([entry[name] for entry in logs] for name in ("objective/kl", "objective/scores"))
    axes.scatter(kl, reward, c=range(len(logs)), cmap="Blues", vmin=-len(logs) / 2, s=14, alpha=0.6)
    way = moving_mean(kl, window), moving_mean(reward, window)
    axes.plot(*way, color=BLUE, linewidth=1.5)
    end = (way[0][-1], way[1][-1])
    axes.axline(end, slope=tau, color=ORANGE, linestyle="--", linewidth=1, label="equal reward - tau KL")
    axes.set(title="Reward against KL", xlabel="KL, nats per completion", ylabel="mean score")
    axes.legend(frameon=False, loc="lower right")
