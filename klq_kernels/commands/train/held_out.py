"""The report of ``klq train`` on held-out prompts: the trainer's evaluation, and how often a task's judge prefers
the policy's completions now to those before training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

from ...lab.tasks import Task
from ...trainer.evaluation import answers
from ...trainer.qsharp import QSharpTrainer
from ...trainer.trainer import KLQTrainer


@dataclass
class HeldOut:
    """Judges a trainer's policy on held-out prompts, where it can against what the policy wrote before training.

    A guide's trainer reports the reference's rewards beside the guided ones, and has no judge.
    """

    trainer: KLQTrainer | QSharpTrainer
    task: Task | None
    console: Console
    results: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        data: Any = self.trainer.eval_dataset
        self.rows: list[dict[str, Any]] = [] if data is None else list(data)
        self.baseline: list[str] | None = None  # what the policy wrote when it was first measured

    @property
    def judged(self) -> bool:
        """Whether completions go to the task's judge."""
        return self.task is not None and isinstance(self.trainer, KLQTrainer)

    def answers(self, sample: int) -> list[str]:
        assert isinstance(self.trainer, KLQTrainer)
        with self.bar("completions for the judge") as advance:
            return answers(self.trainer, self.rows, sample, advance)

    def measure(self, when: str) -> None:
        """Adds the results of the policy as it is now."""
        if not self.rows:
            return
        if self.judged and self.baseline is None:
            self.baseline = self.answers(0)
        with self.bar(f"evaluation {when} training") as advance, each_turn(self.trainer, advance):
            found = self.trainer.evaluate()
        measured = {n.removeprefix("eval_"): value for n, value in found.items() if n.startswith("eval_")}
        if self.judged and self.task is not None and self.baseline is not None:
            measured["win_rate"] = win_rate(self.task, self.rows, self.answers(1), self.baseline)
        self.results[when] = measured

    @contextmanager
    def bar(self, text: str) -> Iterator[Callable[[], None]]:
        """A line that says what takes its time, and how far this process is with its turns."""
        columns = TextColumn("Held-out prompts: {task.description}"), BarColumn(12), TimeElapsedColumn()
        with Progress(*columns, console=self.console, disable=bool(self.trainer.args.disable_tqdm)) as progress:
            task = progress.add_task(text, total=len(self.trainer.turns(len(self.rows))))
            yield lambda: progress.advance(task)


@contextmanager
def each_turn(trainer: KLQTrainer | QSharpTrainer, then: Callable[[], None]) -> Iterator[None]:
    """Inside, ``then`` is called after each batch of an evaluation."""
    callback = EachTurn(then)
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


class EachTurn(TrainerCallback):
    """See ``each_turn``."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then = then

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.then()


def win_rate(task: Task, rows: list[dict[str, Any]], ours: list[str], theirs: list[str]) -> float:
    """How often the task's judge prefers our completion to theirs for the same prompt; a tie is half a win."""
    wins = 0.0
    for row, mine, other in zip(rows, ours, theirs, strict=True):
        a, b = (task.judge(row["prompt"], text, row) for text in (mine, other))
        wins += 1.0 if a > b else 0.5 if a == b else 0.0
    return wins / len(rows)
