"""Pictures of the results: curves with their 95% bands, and reward against KL."""

# ruff: noqa: RUF001 (Greek letters are meant)

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..display import BLUE, GREEN, GREY, MARKERS, ORANGE, RED, finish
from .analysis import Results
from .statistics import Interval

COLOURS = (BLUE, ORANGE, GREEN, RED)
METHOD_COLOURS = (BLUE, GREEN, ORANGE, RED, GREY)
ALGORITHMS = {"klq": BLUE, "ppo": ORANGE}
LINES = ("samples", "staleness", "replay_cycles", "num_generations", "scale_rewards")  # settings that are compared
AXES = {"reward": ("Reward", "mean score"), "kl": ("KL to the reference", "nats per completion")}


def draw(name: str, results: Results, path: Path) -> None:
    """Draws the picture of an experiment, if its kind has one."""
    if results["kind"] == "gradients":
        draw_errors(results, path)
    elif results["kind"] == "noise":
        draw_noise(results, path)
    elif lines := next((name for name in LINES if name in results["variants"][0]["variant"]), None):
        draw_grid(results, path, lines=lines)
    elif results["kind"] == "methods":
        draw_methods(results, path)
    elif "pairs" in results:
        draw_comparison(results, path)
    else:
        draw_curves(results, path)


def name_of(variant: dict[str, Any]) -> str:
    names = {"lam": "λ", "tau": "τ", "samples": "K", "staleness": "staleness"}
    names |= {"num_update_epochs": "passes", "replay_cycles": "cycles replayed"}
    names |= {"num_generations": "completions", "scale_rewards": "scaled", "advantage_spread": "spread"}
    values = {"klq": "KLQ", "ppo": "PPO", "reinforce": "REINFORCE", "cd": "CD", "none": "uncorrected"}
    values |= {"retrace": "Retrace", "bernoulli": "Q♯ (bernoulli)", "categorical": "Q♯ (categorical)"}
    values |= {"True": "yes", "False": "no", "None": "any"}
    said = {n: values.get(str(value), str(value)) for n, value in variant.items()}
    return ", ".join(f"{names[n]} = {text}" if n in names and text != "dense" else text for n, text in said.items())


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


def draw_methods(results: Results, path: Path) -> None:
    """Reward over the run, and reward against KL where a method ends, at each price of a nat."""
    figure, (over_time, ends) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for entry, colour, marker in zip(results["variants"], METHOD_COLOURS, MARKERS * 2, strict=False):
        label = name_of(entry["variant"])
        band(over_time, entry["curves"], "reward", color=colour, label=label)
        kl, reward = ([Interval(*point[name]) for point in entry["front"]] for name in ("kl", "reward"))
        ends.errorbar(
            [i.mean for i in kl], [i.mean for i in reward], xerr=[i.half or 0.0 for i in kl],
            yerr=[i.half or 0.0 for i in reward], color=colour, marker=marker, linewidth=1.5, capsize=2, label=label,
        )  # fmt: skip
    start = results["variants"][0]["before"][0]
    for axes in (over_time, ends):
        axes.axhline(start, color=GREY, linewidth=1, linestyle="--")
    means = [mean for entry in results["variants"] for mean in entry["curves"]["reward"]["mean"]]
    limits = (min(means) - 0.1, max(means) + 0.1)  # the intervals of a few seeds may be far wider
    over_time.set(title="Reward", xlabel="optimizer steps", ylabel="mean score", ylim=limits)
    ends.set(title="Reward against KL", xlabel="KL, nats per completion", ylabel="mean score")
    ends.legend(frameon=False)
    finish(figure, path, over_time, ends)


def draw_comparison(results: Results, path: Path) -> None:
    """Reward and KL over the run, a column for each tau, and where the runs end."""
    taus = sorted({entry["variant"]["tau"] for entry in results["variants"]})
    figure = plt.figure(figsize=(4 * len(taus) + 5, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, len(taus) + 1, width_ratios=[1] * len(taus) + [1.4])
    ends = figure.add_subplot(grid[:, -1])
    panels: list[Axes] = [ends]
    for row, (name, (title, unit)) in enumerate(AXES.items()):
        for column, tau in enumerate(taus):
            axes = figure.add_subplot(grid[row, column], sharey=panels[-1] if column else None)
            for entry in results["variants"]:
                if entry["variant"]["tau"] == tau:
                    algorithm = entry["variant"]["algorithm"]
                    band(axes, entry["curves"], name, color=ALGORITHMS[algorithm], label=algorithm.upper())
            axes.set(title=f"{title}, τ = {tau}", xlabel="optimizer steps", ylabel="" if column else unit)
            panels.append(axes)
    panels[1].legend(frameon=False, loc="lower right")
    for entry in results["variants"]:
        variant, (kl, kl_half), (reward, half) = entry["variant"], entry["after"]["kl"], entry["after"]["reward"]
        ends.errorbar(
            kl, reward, xerr=kl_half, yerr=half, capsize=3, linestyle="none", label=name_of(variant),
            color=ALGORITHMS[variant["algorithm"]], marker=MARKERS[taus.index(variant["tau"]) % len(MARKERS)],
        )  # fmt: skip
    ends.set(title="Held-out reward against KL, at the end", xlabel="KL, nats per completion", ylabel="mean score")
    ends.legend(frameon=False, fontsize=9)
    finish(figure, path, *panels)


def draw_noise(results: Results, path: Path) -> None:
    """The error of a mean over seeds, and the share of a mini-batch's variance that sampling adds."""
    figure, (means, shares) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    found = results["unbiased"]
    for (name, errors), colour in zip(found["errors"].items(), COLOURS, strict=False):
        means.plot(found["seeds"], errors, marker="o", color=colour, label=name)
        ideal = [errors[0] / n**0.5 for n in found["seeds"]]
        means.plot(found["seeds"], ideal, color=GREY, linewidth=1, linestyle="--")
    means.set(
        title=f"Mean over seeds, K = {found['samples']} (dashed: 1/√n)", xlabel="seeds",
        ylabel="relative distance from dense", xscale="log", yscale="log",
    )  # fmt: skip
    names = list(dict.fromkeys(entry["batch"] for entry in results["variance"]))
    for name, colour in zip(names, COLOURS, strict=False):
        entries = [entry for entry in results["variance"] if entry["batch"] == name]
        samples = [entry["samples"] for entry in entries]
        shares.plot(samples, [e["share"]["head"] for e in entries], marker="o", color=colour, label=f"{name}, dW")
        if "parameters" in entries[0]["share"]:
            numbers = [e["share"]["parameters"] for e in entries]
            shares.plot(samples, numbers, marker="s", color=colour, linestyle=":", label=f"{name}, all parameters")
    shares.axhline(0.02, color=GREY, linewidth=1)
    shares.set(
        title="Added variance (line: 2%)", xlabel="K", ylabel="share of the mini-batch's own", xscale="log",
        yscale="log",
    )  # fmt: skip
    for axes in (means, shares):
        axes.legend(frameon=False, fontsize=9)
    finish(figure, path, means, shares)


def draw_grid(results: Results, path: Path, *, lines: str) -> None:
    """Reward and KL over the run, a line for each value of one setting, a column for each value of the other."""
    other = next((name for name in results["variants"][0]["variant"] if name != lines), None)
    values = list(dict.fromkeys(entry["variant"].get(other) for entry in results["variants"]))
    size = (max(4 * len(values), 6), 6.4)
    figure, panels = plt.subplots(2, len(values), figsize=size, layout="constrained", sharey="row", squeeze=False)
    for row, (name, (title, unit)) in enumerate(AXES.items()):
        for axes, value in zip(panels[row], values, strict=True):
            entries = [entry for entry in results["variants"] if entry["variant"].get(other) == value]
            for entry, colour in zip(entries, COLOURS, strict=False):
                label = name_of({lines: entry["variant"][lines]})
                band(axes, entry["curves"], name, color=colour, label=label)
            of = "" if other is None else f", {name_of({other: value})}"
            axes.set(title=title + of, xlabel="steps", ylabel=unit)
    panels[0][0].legend(frameon=False)
    finish(figure, path, *panels.flatten())


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
    axes.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.3))
    finish(figure, path, axes)
