"""``klq bench`` and ``python -m bench``: one command per task, and ``compare``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from klq_kernels.call.checks import renaming
from klq_kernels.commands.cli import Commands
from klq_kernels.commands.folders import usable_file

from . import report
from .environment import describe, timed_package
from .session import run_task
from .shapes import DTYPES, RECORDS, scaled
from .tasks import TASKS, Task

# (rounds, seconds of timing per shape); the quick preset is meant to be over within a minute on two cores
EFFORT = {"tiny": (3, 1.0), "quick": (7, 2.0)}
USUAL_EFFORT = (20, 60.0)
# Left out of the quick preset on a CPU: contenders that compile or run longer than all others, and upcasting fp32.
NOT_QUICK = ("torch.compile", "doubling, compiled", "F.linear_cross_entropy", "naive, fp32 logits")

PRESET_HELP = f"tiny, quick, full; for what reads the vocabulary also {', '.join(RECORDS)}."

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Contenders side by side, checked, then timed.",
)


def command_line() -> str:
    """The command as it was typed, without the folder of the program."""
    return " ".join(["klq bench", *(a for a in sys.argv[1:] if a != "bench")])


def chosen_device(name: str | None) -> torch.device:
    """The device of a name, by default the GPU where there is one. ValueError where it is unknown or not here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: must be cpu or cuda; got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: there is no GPU here that PyTorch can use; leave --device out, or give cpu")
    return device


def chosen_shapes(task: Task, preset: str, dtype: str | None, sweep: str | None) -> list[Any]:
    """The shapes of a preset, in another dtype or along another axis where asked. ValueError on bad input."""
    if preset not in task.presets:
        raise ValueError(f"preset: must be one of {', '.join(task.presets)}; got {preset!r}")
    shapes = task.presets[preset]
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}; got {dtype!r}")
        shapes = list(dict.fromkeys(shape._replace(dtype=DTYPES[dtype]) for shape in shapes))
    if sweep is not None:
        axis, _, values = sweep.partition("=")
        try:
            points = [int(v) for v in values.split(",")]
        except ValueError:
            raise ValueError(f"sweep: must look like vocab=8192,32768; got {sweep!r}") from None
        if min(points) < 1:
            raise ValueError(f"sweep: {axis} must be at least 1; got {values}")
        with renaming({"axis": "sweep"}):
            shapes = [scaled(shapes[0], axis, point) for point in points]
    return shapes


def chosen_contenders(task: Task, names: str | None, preset: str, device: torch.device) -> Task:
    """The task with only these contenders (separated by semicolons), or with those that suit the preset."""
    if names is None:
        skip = NOT_QUICK if preset == "quick" and device.type == "cpu" else ()
        return _with(task, lambda name: name not in skip)
    wanted = [n.strip() for n in names.split(";")]
    unknown = [n for n in wanted if n not in {c.name for c in task.contenders}]
    if unknown:
        known = "; ".join(c.name for c in task.contenders)
        raise ValueError(f"contenders: no such contender: {'; '.join(unknown)}. There are: {known}")
    return _with(task, lambda name: name in wanted)


def _with(task: Task, keep: Callable[[str], bool]) -> Task:
    return replace(task, contenders=[c for c in task.contenders if keep(c.name)])


def _bench(
    name: str,
    preset: str,
    device: str | None,
    dtype: str | None,
    sweep: str | None,
    contenders: str | None,
    rounds: int | None,
    with_memory: bool,
    memory_limit: float | None,
    json: Path | None,
    csv: Path | None,
    plot: Path | None,
) -> None:
    from rich.console import Console

    for option, file in (("--json", json), ("--csv", csv), ("--plot", plot)):
        usable_file(option, file)
    on = chosen_device(device)
    shapes = chosen_shapes(TASKS[name], preset, dtype, sweep)
    task = chosen_contenders(TASKS[name], contenders, preset, on)
    environment = describe(on, command_line())
    print(timed_package(environment), file=sys.stderr)
    usual_rounds, seconds = EFFORT.get(preset, USUAL_EFFORT)
    with Console(stderr=True).status("starting") as status:
        records = run_task(
            task, shapes, on, rounds=rounds or usual_rounds, seconds=seconds, with_memory=with_memory,
            limit=None if memory_limit is None else int(memory_limit * 2**30), say=status.update,
        )  # fmt: skip
    content = report.document(records, environment, preset=preset)
    report.show(content)
    if json is not None:
        report.save_json(json, content)
    if csv is not None:
        report.save_csv(csv, content)
    if plot is not None:
        from .plot import plot as draw

        draw(content, plot)


def _command(task: Task) -> Callable[..., None]:
    def command(
        preset: Annotated[str, typer.Option(help=PRESET_HELP)] = "quick",
        device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one.")] = None,
        dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 instead of the preset's.")] = None,
        sweep: Annotated[str | None, typer.Option(help="Vary the preset's first shape: vocab=8192,32768.")] = None,
        contenders: Annotated[str | None, typer.Option(help="Only these, separated by semicolons.")] = None,
        rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of timing.")] = None,
        with_memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory.")] = True,
        memory_limit: Annotated[float | None, typer.Option(min=0.1, help="GiB a contender may use (CPU).")] = None,
        json: Annotated[Path | None, typer.Option(help="Write the run here.")] = None,
        csv: Annotated[Path | None, typer.Option(help="Write one line per contender and shape here.")] = None,
        plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    ) -> None:
        _bench(
            task.name, preset, device, dtype, sweep, contenders, rounds, with_memory, memory_limit, json, csv, plot
        )  # fmt: skip

    return command


for _task in TASKS.values():
    app.command(_task.name, help=f"{_task.says[0].upper()}{_task.says[1:]}.")(_command(_task))


@app.command()
def compare(before: Path, after: Path) -> None:
    """The changes between two runs: times beyond their spread, memory, status."""
    report.show_comparison(report.compare(report.load_json(before), report.load_json(after)))
