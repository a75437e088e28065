"""An experiment from start to end: the jobs that are not done yet, their analysis, pictures, and the page.

    OUT/results.json           what was measured, of every experiment that has been run into OUT
    OUT/NAME.png               pictures
    OUT.md                     the page
    OUT/jobs/NAME/             a file per job: delete it and the job runs again

So an experiment that was interrupted goes on where it stopped, and one that is complete only redraws.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...call.checks import require
from . import analysis, page, plots
from .job import result
from .pool import run_all
from .spec import GROUPS, NAMES, Experiment, Job, load

RESULTS = "results.json"


def run(names: Sequence[str], out: Path, *, seeds: int | None = None, workers: int = 2, quick: bool = False) -> None:
    """Runs experiments and writes their results, pictures and page.

    Args:
        names: of ``NAMES`` and ``GROUPS``.
        out: a folder.
        seeds: how many, in place of what the experiments say.
        workers: jobs at a time, each of them on one thread.
        quick: small sizes, to try it out.

    Raises:
        ValueError: naming the argument that is wrong.
        RuntimeError: where a job failed.
    """
    require(workers >= 1, "workers", f"must be at least 1, got {workers}")
    wanted = [each for name in names for each in GROUPS.get(name, (name,))]
    experiments = [load(name, seeds=seeds, quick=quick) for name in wanted]
    console, began = Console(), time.perf_counter()
    columns = TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        for experiment in experiments:
            found = measure(experiment, out, workers, progress)
            keep(out, experiment.name, found)
            plots.draw(experiment.name, found, out / f"{experiment.name}.png")
    written = write_page(out)
    console.print(f"{time.perf_counter() - began:.0f} s. The page is {written}, with {out / RESULTS}.", soft_wrap=True)


def measure(experiment: Experiment, out: Path, workers: int, progress: Progress) -> dict[str, Any]:
    """Runs the sweep, the jobs with what it chose, and the timing; returns the results."""
    folder, warm = out / "jobs" / experiment.name, out / "jobs" / "warm_start"
    candidates, timing = experiment.sweep_jobs(), experiment.timing_jobs()
    bar = progress.add_task(experiment.name, total=len(candidates) + len(experiment.jobs({})) + len(timing))

    def finish(jobs: list[Job]) -> list[dict[str, Any]]:
        missing = [job for job in jobs if result(job, folder / f"{job.name}.json") is None]
        progress.update(bar, advance=len(jobs) - len(missing))
        run_all(missing, folder, warm, workers, lambda: progress.update(bar, advance=1))
        return [r for job in jobs if (r := result(job, folder / f"{job.name}.json")) is not None]

    sweep = finish(candidates)
    chosen = analysis.choose(experiment, sweep)
    return analysis.analyse(experiment, finish(experiment.jobs(chosen)), sweep, chosen, finish(timing))


def keep(out: Path, name: str, found: dict[str, Any]) -> None:
    """Puts the results of an experiment beside those of the others, in the order of the page."""
    path = out / RESULTS
    every = json.loads(path.read_text()) if path.exists() else {}
    every = {**every, name: rounded(found)}
    path.write_text(json.dumps({n: every[n] for n in NAMES if n in every}, indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Numbers to seven digits: what a reader of the file can use."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def write_page(out: Path) -> Path:
    """``OUT.md``, from ``OUT/results.json``."""
    path = out.with_name(f"{out.name}.md")
    path.write_text(page.page(json.loads((out / RESULTS).read_text()), pictures=out.name))
    return path
