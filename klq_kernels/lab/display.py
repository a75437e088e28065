"""Tables and pictures, as the trainer, the experiments and the demonstration make them.

Importing this module also tells matplotlib to draw into files, without a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

# Okabe and Ito's palette: told apart by every kind of colour vision.
GREY, ORANGE, BLUE, GREEN, RED = "#999999", "#E69F00", "#0072B2", "#009E73", "#D55E00"
MARKERS = ("s", "^", "o")


def moving_mean(numbers: Sequence[float], window: int) -> list[float]:
    """The mean of each number and those before it, at most ``window`` of them."""
    means = []
    for end in range(1, len(numbers) + 1):
        seen = numbers[max(end - window, 0) : end]
        means.append(sum(seen) / len(seen))
    return means


def finish(figure: Figure, path: Path, *panels: Axes) -> None:
    """Gives the panels a light grid and no box, and writes the figure to ``path``."""
    for axes in panels:
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def rich_table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    """A table for the terminal: names on the left, numbers to the right."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """The same for a page."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_text(page: str, name: str, text: str) -> str:
    """A page with ``text`` between its comments "begin NAME", which may say more, and "end NAME".

    Raises:
        ValueError: where the page lacks one of them.
    """
    begin = page.index("-->", page.index(f"<!-- begin {name}")) + len("-->")
    return f"{page[:begin]}\n{text}\n{page[page.index(f'<!-- end {name} -->') :]}"
