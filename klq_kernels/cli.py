"""The ``klq`` command: every command is declared here, in one place, and does its work elsewhere.

Commands import what they need when they are called, so that ``klq info`` does not wait for a training stack. A
ValueError, which is how this package reports bad input, is shown as one line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import rich  # noqa: F401  (what the commands print with; checked here so that none fails half-way)
    import typer
except ImportError:
    raise SystemExit("klq needs typer and rich: pip install 'klq_kernels[cli]'") from None

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="KL-regularised Q-learning on large-vocabulary language models.",
)


@app.command()
def info(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Versions, devices, and which backend each device uses and why not the others."""
    from . import info as report

    facts = report.environment()
    if json:
        report.print_json(facts)
    else:
        report.print_tables(facts)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the report and its pictures go.")] = Path("demo_output"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the model, its data and its samples.")] = 0,
) -> None:
    """Train a small model with the fused loss, and compare it with the naive implementation."""
    from . import demo as demonstration

    demonstration.run(out, steps, seed)


# Further commands go here: app.command() for one, app.add_typer() for a group.


def main() -> None:
    """The entry point. Exits with 2 where the input was bad."""
    try:
        app()
    except ValueError as error:
        print("klq:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
