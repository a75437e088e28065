"""The two pictures: what the fused loss saves, and what the model learns with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..display import BLUE, GREEN, GREY, MARKERS, ORANGE, RED, finish, moving_mean
from .memory import MIB

COLOURS = (GREY, ORANGE, BLUE)


def plot_memory(measured: dict[str, Any], path: Path) -> None:
    """Bars of peak memory and of time, and memory against the size of the vocabulary."""
    shape, contenders = measured["shape"], measured["contenders"]
    figure, (memory, time, growth) = plt.subplots(
        1, 3, figsize=(13, 4.4), width_ratios=(1, 1, 1.3), layout="constrained"
    )
    figure.suptitle(
        f"KLQ loss and gradients: {shape['tokens']:,} tokens, {shape['response_tokens']:,} of them trained, "
        f"hidden size {shape['hidden']}, fp32, CPU"
    )
    names = [name.replace(", ", ",\n") for name in contenders]
    peaks = [c["peak_bytes"] / MIB for c in contenders.values()]
    gradients = measured["gradient_bytes"][shape["vocab"]] / MIB
    bars = memory.bar(names, peaks, color=COLOURS)
    memory.bar_label(bars, [f"{p:,.0f}" for p in peaks], padding=2)
    memory.axhline(gradients, color="black", linestyle="--", linewidth=1, label="the gradients themselves")
    memory.legend(frameon=False, fontsize=9)
    memory.set(title=f"Peak memory, vocabulary of {shape['vocab']:,}", ylabel="MiB over the inputs")
    seconds = [c["seconds"] for c in contenders.values()]
    spread = [
        [s - min(c["seconds_of_rounds"]) for s, c in zip(seconds, contenders.values(), strict=True)],
        [max(c["seconds_of_rounds"]) - s for s, c in zip(seconds, contenders.values(), strict=True)],
    ]
    time.bar(names, seconds, color=COLOURS, yerr=spread, capsize=4)
    for i, c in enumerate(contenders.values()):
        time.annotate(
            f"{c['seconds']:.2f}", (i, max(c["seconds_of_rounds"])), xytext=(0, 4), textcoords="offset points",
            ha="center",
        )  # fmt: skip
    time.set(title="Time: median, fastest to slowest", ylabel="seconds, forward and backward")
    for (name, c), colour, marker in zip(contenders.items(), COLOURS, MARKERS, strict=True):
        sizes = list(c["peak_bytes_by_vocab"])
        growth.plot(
            [v / 1000 for v in sizes], [c["peak_bytes_by_vocab"][v] / MIB for v in sizes],
            color=colour, marker=marker, linewidth=2, label=name,
        )  # fmt: skip
    sizes = list(measured["gradient_bytes"])
    growth.plot(
        [v / 1000 for v in sizes], [measured["gradient_bytes"][v] / MIB for v in sizes],
        color="black", linestyle="--", linewidth=1, label="the gradients themselves",
    )  # fmt: skip
    growth.set(
        title="Peak memory against vocabulary", xlabel="vocabulary, thousand tokens", ylabel="MiB over the inputs"
    )
    growth.set(xlim=0, ylim=0)
    growth.legend(frameon=False, fontsize=9)
    for axes in (memory, time):
        axes.tick_params(axis="x", labelsize=8.5)
        axes.margins(y=0.12)
    finish(figure, path, memory, time, growth)


def plot_training(history: list[dict[str, float]], path: Path, *, start: float, batch: int, window: int = 5) -> None:
    """Reward and KL, large; below them entropy, length and how well V explains the returns.

    ``start`` is the warm-started model's mean reward on held-out letters.
    """
    figure = plt.figure(figsize=(11, 7), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1.6, 1))
    curves = (
        ("reward", grid[0, :3], "Reward", "mean score, 0 to 1", BLUE),
        ("kl", grid[0, 3:], "KL to the reference", "nats per response", RED),
        ("entropy", grid[1, :2], "Entropy", "nats per token", GREEN),
        ("length", grid[1, 2:4], "Length", "tokens per response", GREEN),
        ("explained_variance", grid[1, 4:], "Returns explained by V", "share of variance", GREEN),
    )
    steps = range(1, len(history) + 1)
    panels: dict[str, Axes] = {}
    for name, place, title, unit, colour in curves:
        axes = panels[name] = figure.add_subplot(place)
        numbers = [step[name] for step in history]
        axes.plot(steps, numbers, ".", color=colour, alpha=0.35, label="each step")
        axes.plot(steps, moving_mean(numbers, window), color=colour, linewidth=2, label=f"mean of the last {window}")
        axes.set(title=title, ylabel=unit, xlabel=f"step ({batch} responses each)")
    panels["reward"].axhline(start, color=GREY, linestyle="--", label="before training (held-out letters)")
    panels["reward"].set_ylim(0, 1.02)
    panels["kl"].set_ylim(bottom=0)
    panels["explained_variance"].axhline(0, color=GREY, linewidth=1)
    panels["reward"].legend(frameon=False, loc="lower right")
    finish(figure, path, *panels.values())
