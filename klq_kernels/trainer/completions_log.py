"""A log of completions: a few of each cycle as a table to read, all of them in ``completions.jsonl`` to keep.

A resumed run samples again what came after its checkpoint. Those rows, and the rows of another run in the same folder,
are moved to ``_earlier-completions.jsonl``, so that the log holds each completion of this run once.
"""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

from .config import KLQConfig
from .resuming import EARLIER
from .rewards import Scores

CELL = 300  # characters of a text that the table shows


class CompletionsLog:
    """Of one process; every process writes a file of its own, and one of them begins for all."""

    def __init__(self, config: KLQConfig) -> None:
        self._config = config
        suffix = f"_{config.process_index}" if config.process_index else ""
        self._file = Path(str(config.output_dir)) / f"completions{suffix}.jsonl"

    def begin(self, step: int) -> None:
        """Moves the rows of optimizer step ``step`` and later ones, which this run is going to write, of all processes
        that an earlier one had.
        """
        for path in self._file.parent.glob("completions*.jsonl"):
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) < step]
            if len(kept) < len(lines):
                with path.with_name(EARLIER + path.name).open("a") as file:
                    file.writelines(f"{line}\n" for line in lines if _step_of(line) >= step)
                whole = path.with_suffix(".part")
                whole.write_text("".join(f"{line}\n" for line in kept))
                whole.replace(path)

    def add(self, step: int, prompts: list[Any], completions: list[str], scores: Scores, names: list[str]) -> None:
        """Logs one cycle: prompts as in the dataset, decoded completions, and ``names`` of the scores' columns."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        totals = scores.total.tolist()
        with self._file.open("a") as file:
            for i, (prompt, completion, total) in enumerate(zip(prompts, completions, totals, strict=True)):
                each = dict(zip(names, scores.each[i].tolist(), strict=True))
                row = {"step": step, "prompt": prompt, "completion": completion, "score": total, "rewards": each}
                file.write(json.dumps(row, default=str) + "\n")
        if self._config.process_index == 0:
            self._show(step, prompts, completions, totals)

    def _show(self, step: int, prompts: list[Any], completions: list[str], totals: list[float]) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("prompt", "completion", "score", title=f"step {step}", show_lines=True)
        rows = zip(prompts, completions, totals, strict=True)
        for prompt, completion, total in islice(rows, self._config.num_completions_to_print):
            text = prompt if isinstance(prompt, str) else said(prompt[-1])
            table.add_row(cell(text), cell(completion), f"{total:.3f}")
        Console().print(table)


def _step_of(line: str) -> float:
    """The step of a row; infinite where a killed run has not written it to its end."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def said(message: dict[str, Any]) -> str:
    """The content of a chat message; what is no text (parts, images) or none at all (calls of tools) as JSON."""
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(message if content is None else content, default=str)


def cell(text: str) -> str:
    """Text as a table shows it: no markup, not endless."""
    from rich.markup import escape

    return escape(text if len(text) <= CELL else text[:CELL] + " ...")
