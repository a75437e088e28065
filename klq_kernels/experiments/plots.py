"""Pictures of the results: curves with their 95% bands, and reward against KL."""

# ruff: noqa: RUF001 (Greek letters are meant)

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..demo.plots import BLUE, GREEN, GREY, MARKERS, ORANGE, RED
from ..demo.plots import _finish as finish
from .analysis import Results

COLOURS = (BLUE, ORANGE, GREEN, RED)
AXES = {"reward": ("Reward", "mean score"), "kl": ("KL to the reference", "nats per completion")}


def draw(name: str, results: Results, path: Path) -> None:
    """Draws the picture of an experiment, if its kind has one."""
    if results["kind"] == "gradients":
        draw_errors(results, path)
    elif "pairs" in results:
        draw_comparison(results, path)
    else:
        draw_curves(results, path)


def name_of(variant: dict[str, Any]) -> str:
    names = {"lam": "λ", "tau": "τ"}
    return ", ".join(
        f"{names[n]} = {value}" if n in names else str(value).replace("klq", "KLQ").replace("ppo", "PPO")
        for n, value in variant.items()
    )


def band(axes: Axes, curves: Results, name: str, **style: Any) -> None:
    """A mean over the seeds, and around it its interval."""
    mean, half = curves[name]["mean"], [h or 0.0 for h in curves[name]["half"]]
    (line,) = axes.plot(curves["step"], mean, linewidth=2, **style)
    low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
    axes.fill_between(curves["step"], low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_curves(results: Results, path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, (name, (title, unit)) in zip(panels, AXES.items(), strict=True):
        for entry, colour in zip(results["variants"], COLOURS, strict=False):
            band(axes, entry["curves"], name, color=colour, label=name_of(entry["variant"]))
        axes.set(title=title, xlabel="optimizer steps", ylabel=unit)
        axes.legend(frameon=False)
    panels[1].axhline(0, color=GREY, linewidth=1)
    finish(figure, path, *panels)


def draw_comparison(results: Results, path: Path) -> None:
    """Reward and KL over the run at each tau, one line style each, and where the runs end."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    taus = sorted({entry["variant"]["tau"] for entry in results["variants"]})
    colours = {"klq": BLUE, "ppo": ORANGE}
    for entry in results["variants"]:
        variant, after = entry["variant"], entry["after"]
        at = taus.index(variant["tau"])
        style = {"color": colours[variant["algorithm"]], "label": name_of(variant)}
        for axes, name in zip(panels, AXES, strict=False):
            band(axes, entry["curves"], name, linestyle=("-", "--", ":")[at % 3], **style)
        panels[2].errorbar(
            after["kl"][0], after["reward"][0], xerr=after["kl"][1], yerr=after["reward"][1],
            marker=MARKERS[at % 3], capsize=3, linestyle="none", **style,
        )  # fmt: skip
    for axes, (title, unit) in zip(panels, AXES.values(), strict=False):
        axes.set(title=title, xlabel="optimizer steps", ylabel=unit)
    panels[2].set(title="Held-out reward against KL, at the end", xlabel="KL, nats per completion", ylabel="mean score")
    panels[2].legend(frameon=False, fontsize=9)
    finish(figure, path, *panels)


def draw_errors(results: Results, path: Path) -> None:
    """How far the gradients are apart, with the penalty and without it."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    alphas = [entry["alpha"] for entry in results["alphas"]]
    lines = (
        ("rollout", "at the rollout, float64", BLUE, "o"),
        ("rollout_fused", "at the rollout, fused_klq_loss in fp32", GREEN, "s"),
        ("away", "away from it, with the penalty β", ORANGE, "^"),
        ("away_without_beta", "away from it, without", RED, "v"),
    )
    for name, text, colour, marker in lines:
        errors = [max(entry[name]["relative_error"], 1e-17) for entry in results["alphas"]]
        axes.plot(alphas, errors, marker=marker, color=colour, label=text)
    axes.set(title="KLQ's gradient against PPO's", xlabel="α", ylabel="relative error", yscale="log")
    axes.legend(frameon=False)
    finish(figure, path, axes)
