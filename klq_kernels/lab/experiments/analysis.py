"""From what the jobs wrote to ``results.json``: per variant, held-out means and curves over the seeds, with intervals.

Everything that pictures and words need is in the results, so that both can be made again without the jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..display import moving_mean
from .spec import Experiment, Settings, label
from .statistics import interval, paired, win_share

Results = dict[str, Any]
WINDOW = 5  # cycles that a curve averages
MEASURED = {  # what a single job of this kind measures
    "gradients": ("alphas", "whitened", "tokens", "tau"),
    "noise": ("unbiased", "variance"),
}
HELD_OUT = ("reward", "kl", "objective", "length")


def objective(found: Mapping[str, float], tau: float) -> float:
    """The objective of both algorithms: reward - tau KL."""
    return found["reward"] - tau * found["kl"]


def tau_of(job: Mapping[str, Any]) -> float:
    return job["job"]["settings"]["tau"]


def analyse(
    experiment: Experiment,
    jobs: list[Results],
    sweep: list[Results],
    chosen: Mapping[str, Settings],
    timing: list[Results],
) -> Results:
    """The results of an experiment, plain enough for JSON.

    Args:
        experiment: what was asked.
        jobs: what its jobs wrote.
        sweep: what the jobs of its sweep wrote.
        chosen: what the sweep chose (see ``choose``).
        timing: what the job that takes times wrote, if there is one.
    """
    results: Results = {
        "title": experiment.title, "question": experiment.question, "kind": experiment.kind,
        "settings": experiment.settings, "seeds": experiment.seeds,
        "seconds": sum(job["seconds"] for job in [*jobs, *sweep, *timing]),
    }  # fmt: skip
    if experiment.kind in MEASURED:
        return results | {name: jobs[0][name] for name in MEASURED[experiment.kind]}
    groups = [(v, [job for job in jobs if v.items() <= job["job"]["settings"].items()]) for v in experiment.variants()]
    results["variants"] = [summary(variant, group) for variant, group in groups]
    if experiment.sweep is not None:
        results["sweep"] = [
            {"name": job["job"]["name"].removeprefix("sweep,"), "objective": objective(job["after"], tau_of(job))}
            for job in sweep
        ]
        results["chosen"] = dict(chosen)
    if timing:
        times = {
            name: {kind: found[f"median_{kind}"] for kind in ("wall", "cpu")}
            for name, found in timing[0]["times"].items()
        }
        results["timing"] = {"update_ms": times, "rounds": timing[0]["rounds"], "tokens": timing[0]["tokens"]}
    if experiment.compare:
        results["pairs"] = [pair for base in experiment.compare.items() for pair in pairs(groups, dict([base]))]
    return results


def summary(variant: Settings, jobs: list[Results]) -> Results:
    """Means over the seeds of one variant."""
    finals = [{**job["after"], "objective": objective(job["after"], tau_of(job))} for job in jobs]
    found = {
        "variant": variant,
        "before": interval([job["before"]["reward"] for job in jobs]),
        "after": {name: interval([final[name] for final in finals]) for name in HELD_OUT},
        "curves": curves(jobs),
    }
    return found | ({"front": front(jobs)} if "front" in jobs[0] else {})


def front(jobs: list[Results]) -> list[Results]:
    """Reward and KL at each price, over the seeds."""
    points = zip(*(job["front"] for job in jobs), strict=True)
    return [
        {"price": each[0]["price"]} | {name: interval([point[name] for point in each]) for name in ("reward", "kl")}
        for each in points
    ]


def curves(jobs: list[Results]) -> Results:
    """Each curve's mean over the seeds and the last cycles, with the half-width of its interval over the seeds."""
    out: Results = {"step": jobs[0]["curves"]["step"]}
    for name in jobs[0]["curves"].keys() - {"step"}:
        smooth = [moving_mean(job["curves"][name], WINDOW) for job in jobs]
        at_each_step = [interval(numbers) for numbers in zip(*smooth, strict=True)]
        out[name] = {"mean": [i.mean for i in at_each_step], "half": [i.half for i in at_each_step]}
    return dict(sorted(out.items()))


def pairs(groups: list[tuple[Settings, list[Results]]], base: Settings) -> list[Results]:
    """Each variant less the one that differs from it in the setting of ``base`` alone, which has the value there, seed
    by seed; and how often the judge, where there is one, prefers it.
    """
    by_name = {label(variant): jobs for variant, jobs in groups}
    out = []
    for variant, ours in groups:
        if base.items() <= variant.items():
            continue
        theirs = by_name[label({**variant, **base})]
        both = list(zip(ours, theirs, strict=True))
        difference = {
            name: paired([job["after"][name] for job in ours], [job["after"][name] for job in theirs])
            for name in ("reward", "kl")
        }
        difference["objective"] = paired(
            *([objective(job["after"], tau_of(job)) for job in jobs] for jobs in (ours, theirs))
        )
        entry: Results = {"variant": variant, "base": base, "difference": difference}
        if all("judged" in job for pair in both for job in pair):
            entry["win_rate"] = interval([win_share(a["judged"], b["judged"]) for a, b in both])
        out.append(entry)
    return out


def choose(experiment: Experiment, sweep: list[Results]) -> dict[str, Settings]:
    """For each group of the sweep the candidate with the best mean objective."""
    if experiment.sweep is None:
        return {}
    scores: dict[str, dict[str, list[float]]] = {}
    candidates: dict[str, Settings] = {}
    for job in sweep:
        settings = job["job"]["settings"]
        candidate = {name: settings[name] for name in experiment.sweep.over}
        candidates[label(candidate)] = candidate
        group = scores.setdefault(experiment.group(settings), {})
        group.setdefault(label(candidate), []).append(objective(job["after"], tau_of(job)))
    return {
        group: candidates[max(found, key=lambda name: sum(found[name]) / len(found[name]))]
        for group, found in scores.items()
    }
