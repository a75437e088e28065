"""The demonstration from start to end: measure, warm-start, train, report. What is known is on disk at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from ..display import rich_table
from . import memory, plots, policy, report, task
from .train import Learner, Settings, rollout, train


@dataclass(frozen=True)
class Size:
    """How much of everything; the tests run a small one."""

    shape: memory.Shape = field(default_factory=memory.Shape)
    vocabularies: tuple[int, ...] = (16384, 98304)
    rounds: int = 5
    warm_steps: int = 160
    settings: Settings = field(default_factory=Settings)
    held_out: int = 192
    samples: int = 4


FULL = Size()
WRITTEN = ("report.md", "memory.png", "memory.json", "training.png", "metrics.csv", "metrics.json")
STATUS = "reward {reward:.2f} KL {kl:.2f} H {entropy:.2f} len {length:.1f} EV {explained_variance:.2f}"


def run(out: Path = Path("demo_output"), steps: int = 60, seed: int = 0, size: Size = FULL) -> None:
    """Writes the files ``WRITTEN`` into ``out``, in place of an earlier run's.

    Args:
        out: a folder, made if it does not exist.
        steps: training steps, at least 1.
        seed: of the model, its data and its samples.
        size: of everything else.

    Raises:
        ValueError: naming the argument that is out of range.
        SystemExit: with 1, after the report is written, where the model did not learn.
    """
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    out.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:  # files of an earlier run must not pass for this run's
        (out / name).unlink(missing_ok=True)
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(8), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[status]}"), console=console) as progress:
        measured = measure(progress, size, seed)
        report.write_json(out / "memory.json", measured)
        plots.plot_memory(measured, out / "memory.png")
        progress.console.print(rich_table("Naive against fused", report.MEMORY_COLUMNS, report.memory_rows(measured)))
        (out / "report.md").write_text("# klq demo\n\n" + report.memory_section(measured))
        verdict = learn(progress, out, steps, seed, size, measured)
    console.print(verdict.words().replace("**", ""))
    console.print(f"The report is {out / 'report.md'}, with memory.png and training.png beside it.")
    if not verdict.learnt:
        raise SystemExit(1)


def measure(progress: Progress, size: Size, seed: int) -> dict[str, Any]:
    stages = 2 + len(memory.CONTENDERS) * len({*size.vocabularies, size.shape.vocab})
    bar = progress.add_task("Memory", total=stages, status="")
    done = -1

    def tell(doing: str) -> None:
        nonlocal done
        done += 1
        progress.update(bar, completed=done, status=doing)

    measured = memory.measure(size.shape, vocabularies=size.vocabularies, rounds=size.rounds, seed=seed, progress=tell)
    progress.update(bar, completed=stages, status="")
    return measured


def learn(progress: Progress, out: Path, steps: int, seed: int, size: Size, measured: dict[str, Any]) -> report.Verdict:
    torch.manual_seed(seed)
    tokenizer = task.build_tokenizer(prompt + summary for prompt, summary in islice(task.examples("tokenizer"), 2000))
    model = policy.build_model(tokenizer)
    bar = progress.add_task("Warm-up", total=size.warm_steps, status="")
    for loss in policy.warm_start(model, tokenizer, seed=seed, steps=size.warm_steps):
        progress.update(bar, advance=1, status=f"loss {loss:.3f}")

    learner = Learner(model, size.settings)
    evaluations = {"before": evaluate(learner, tokenizer, size)}
    history = report.History(out / "metrics.csv")
    bar = progress.add_task("KLQ", total=steps, status="")
    try:
        for metrics in train(learner, tokenizer, islice(batches(seed, size.settings.batch), steps)):
            history.add(metrics)
            progress.update(bar, advance=1, status=STATUS.format(**metrics))
        evaluations["after"] = evaluate(learner, tokenizer, size)
    finally:  # also after Ctrl-C: what was learnt so far is reported
        if history.steps:
            verdict = summarise(out, history.steps, evaluations, measured, steps, seed, size)
    progress.console.print(rich_table("Summaries", report.HELD_OUT_COLUMNS, report.held_out_rows(evaluations)))
    for block in report.samples_text(evaluations):
        progress.console.print(block, markup=False, highlight=False, end="")
    return verdict


def batches(seed: int, size: int) -> Iterator[tuple[list[str], Callable[[list[str], list[bool]], list[float]]]]:
    """Endless batches of letters' prompts, each with the function that scores the responses to them."""
    stream = task.letters(f"train {seed}")
    while True:
        letters = list(islice(stream, size))
        yield [letter.prompt for letter in letters], partial(scores, letters)


def scores(letters: list[task.Letter], summaries: list[str], finished: list[bool]) -> list[float]:
    return [task.reward(*each[:2], finished=each[2]) for each in zip(letters, summaries, finished, strict=True)]


def evaluate(learner: Learner, tokenizer: PreTrainedTokenizerBase, size: Size) -> dict[str, Any]:
    """Mean metrics of one sampled response to each held-out letter, and the first few responses themselves."""
    letters = list(islice(task.letters("held out"), size.held_out))
    batch = rollout(learner.model, tokenizer, [letter.prompt for letter in letters], size.settings.max_new_tokens)
    summaries = tokenizer.batch_decode(batch.actions, skip_special_tokens=True)
    rewards = scores(letters, summaries, (~batch.truncated).tolist())
    _, metrics = learner.score(batch, torch.tensor(rewards))
    samples = [
        {"letter": letter.text, "summary": summary, "reward": reward}
        for letter, summary, reward in islice(zip(letters, summaries, rewards, strict=True), size.samples)
    ]
    return {**{name: value.item() for name, value in metrics.items()}, "samples": samples}


def summarise(
    out: Path,
    history: list[dict[str, float]],
    evaluations: dict[str, dict[str, Any]],
    measured: dict[str, Any],
    steps: int,
    seed: int,
    size: Size,
) -> report.Verdict:
    """Writes the pictures, the report and all the numbers."""
    verdict = report.judge(history, size.settings.tau)
    plots.plot_training(history, out / "training.png", start=evaluations["before"]["reward"], batch=size.settings.batch)
    text = report.training_section(history, evaluations, verdict, steps)
    (out / "report.md").write_text(f"# klq demo\n\n{text}\n{report.memory_section(measured)}")
    report.write_json(
        out / "metrics.json",
        {
            "learnt": verdict.learnt,
            "verdict": asdict(verdict),
            "seed": seed,
            "steps": steps,
            "settings": asdict(size.settings),
            "held_out": evaluations,
            "history": history,
            "memory": measured,
        },
    )
    return verdict
