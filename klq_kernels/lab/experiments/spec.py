"""The parts of an experiment: a YAML file, and the jobs that follow from it.

title, question   for the page
kind              what a job does (see ``job.KINDS``)
settings          the same for every job: ``task``, ``eval_size``, ``value_model``, and fields of ``KLQConfig``
grid              setting -> values; a job for each combination and each seed
compare           optional, setting -> value: every other value of this setting is compared with that one, seed by seed;
                  of several settings each in its turn
seeds             how many, counted from 0
sweep             optional: settings that are chosen first, by jobs of their own on other seeds, for each
                  combination of ``per`` (the rest of the grid at ``at``): the values with the best held-out
                  reward - tau KL
quick             what replaces the above for a try that takes seconds
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ...call.checks import require
from ...trainer.loading import read_yaml

CONFIGS = Path(__file__).parent / "configs"
NAMES = (  # in the order of the page
    "constant", "lambda", "klq-vs-ppo", "equivalence", "sampled-noise", "sampled-learning", "sampled-demo",
    "sampled-optimizers", "staleness-summarize", "staleness-arithmetic",
    "replay-summarize", "replay-arithmetic", "groups-summarize", "groups-arithmetic",
    "normalisation-summarize", "normalisation-arithmetic", "star-graph", "qsharp-arithmetic",
)  # fmt: skip
GROUPS = {  # names that stand for several
    "all": NAMES,
    "sampled-gradient": ("sampled-noise", "sampled-learning", "sampled-demo", "sampled-optimizers"),
    "staleness": ("staleness-summarize", "staleness-arithmetic"),
    "replay": ("replay-summarize", "replay-arithmetic"),
    "groups": ("groups-summarize", "groups-arithmetic"),
    "normalisation": ("normalisation-summarize", "normalisation-arithmetic"),
    "qsharp": ("star-graph", "qsharp-arithmetic"),
}
SWEEP_SEED = 1000  # the first of the seeds that only sweeps use

Settings = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run, in a process of its own; its result is a file of this name."""

    name: str
    kind: str
    settings: Settings


@dataclass(frozen=True)
class Sweep:
    over: dict[str, list[Any]]
    per: list[str]
    at: Settings = field(default_factory=dict)
    seeds: int = 1


@dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    question: str
    settings: Settings
    kind: str = "train"
    grid: dict[str, list[Any]] = field(default_factory=dict)
    compare: Settings = field(default_factory=dict)
    seeds: int = 1
    sweep: Sweep | None = None
    timing: Settings | None = None

    def variants(self) -> list[Settings]:
        """The combinations of the grid."""
        return combinations(self.grid)

    def jobs(self, chosen: Mapping[str, Settings]) -> list[Job]:
        """A job for each combination and seed, with what a sweep has chosen for it."""
        return [
            self.job({**variant, "seed": seed}, chosen.get(self.group(variant), {}))
            for seed in range(self.seeds)  # all variants of a seed first: an interrupted run has whole comparisons
            for variant in self.variants()
        ]

    def sweep_jobs(self) -> list[Job]:
        """A job for each candidate of each group and each seed of the sweep."""
        if self.sweep is None:
            return []
        groups = combinations({name: self.grid[name] for name in self.sweep.per})
        return [
            self.job({**self.sweep.at, **group, **candidate, "seed": SWEEP_SEED + seed}, prefix="sweep,")
            for group in groups
            for candidate in combinations(self.sweep.over)
            for seed in range(self.sweep.seeds)
        ]

    def timing_jobs(self) -> list[Job]:
        """One, or none."""
        return [] if self.timing is None else [Job("timing", "timing", {**self.settings, **self.timing})]

    def group(self, variant: Mapping[str, Any]) -> str:
        """The name of the group that chooses together."""
        return "" if self.sweep is None else label({name: variant[name] for name in self.sweep.per})

    def job(self, variant: Settings, chosen: Mapping[str, Any] | None = None, prefix: str = "") -> Job:
        return Job(prefix + label(variant), self.kind, {**self.settings, **(chosen or {}), **variant})


def combinations(grid: Mapping[str, list[Any]]) -> list[Settings]:
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def label(settings: Mapping[str, Any]) -> str:
    """Settings as a file name."""
    return ",".join(f"{name}={value}" for name, value in settings.items()) or "all"


def load(name: str, *, seeds: int | None = None, quick: bool = False) -> Experiment:
    """The experiment of that name.

    Args:
        name: one of ``NAMES``.
        seeds: how many, in place of the experiment's own number.
        quick: take the small sizes.

    Raises:
        ValueError: naming the argument that is wrong.
    """
    require(name in NAMES, "name", f"must be one of {', '.join([*NAMES, *GROUPS])}; got {name!r}")
    require(seeds is None or seeds >= 1, "seeds", f"must be at least 1, got {seeds}")
    content = read_yaml(CONFIGS / f"{name}.yaml")
    smaller = content.pop("quick", {})
    if quick:
        smaller["settings"] = {**content["settings"], **smaller.get("settings", {})}
        content |= smaller
    if seeds is not None:
        content["seeds"] = seeds
    sweep = content.pop("sweep", None)
    return Experiment(name, **content, sweep=None if sweep is None else Sweep(**sweep))
