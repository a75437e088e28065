"""``klq train``: from its arguments to a trained model, the history of the run and a picture of it.

What a run leaves in ``output_dir``, also one that was interrupted: ``history.json`` (every log), ``training.png``,
checkpoints; and once it is through ``final/`` (the model) and ``summary.json`` (held-out results, before and after).
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import enable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging

from ...call.checks import require
from ...lab.tasks import Task, load_task, warm_started
from ...trainer import loading
from ...trainer.config import KLQConfig
from ...trainer.data import keep_short, load_prompts
from ...trainer.qsharp import QSharpConfig, QSharpTrainer, load_guide
from ...trainer.relatives import CYCLES
from ...trainer.resuming import last_complete_checkpoint
from ...trainer.sharding import shards_weights
from ...trainer.trainer import KLQTrainer
from ..folders import usable_folder
from .arguments import COPY, GuideArguments, ScriptArguments
from .held_out import HeldOut

SOURCE = {"path": "dataset", "name": "dataset_name", "split": "dataset_split", "kind": "dataset_kind"}  # of prompts
STATUS = "reward {objective/scores:.3f}  KL {objective/kl:.2f}  H {policy/entropy_avg:.2f}"
STATUS += "  len {completions/mean_length:.0f}  EV {val/explained_variance:.2f}"
GUIDE_STATUS = "loss {loss:.3f}  EV {guide/explained_variance:.2f}"

# The trainer


def build_trainer(arguments: ScriptArguments, config: KLQConfig | QSharpConfig) -> KLQTrainer | QSharpTrainer:
    """The trainer that the arguments describe, with its data loaded."""
    task = None if arguments.task is None else load_task(arguments.task)
    train, held_out = task_data(task, arguments, config) if task is not None else load_data(arguments)
    rewards: list[Any] = [*(arguments.reward_model or []), *map(load_function, arguments.reward_function or [])]
    if isinstance(config, QSharpConfig):
        models = load_guided(task, arguments, config)
    else:
        models = load_models(task, arguments, config)
    if arguments.drop_long_prompts and config.max_prompt_length is not None:
        template: Any = config.chat_template_kwargs
        limits = (models["processing_class"], config.max_prompt_length, template)
        train, held_out = (None if p is None else keep_short(p, *limits) for p in (train, held_out))
    given: dict[str, Any] = {
        **models,
        "reward_funcs": rewards or list(task.reward_funcs),  # type: ignore[union-attr]
        "args": config,
        "train_dataset": train,
        "eval_dataset": held_out,
    }
    if isinstance(config, QSharpConfig):
        return QSharpTrainer(**given)
    if arguments.demonstrations is not None:
        given["demonstrations"] = read_prompts(arguments, {"path": "demonstrations"}, None)
    return CYCLES.get(config.algorithm, KLQTrainer)(**given, peft_config=lora(arguments))


def load_policy(task: Task | None, arguments: ScriptArguments, config: KLQConfig | QSharpConfig) -> tuple[Any, Any]:
    """The given model or the task's, and its tokenizer."""
    if arguments.model is None:
        assert task is not None
        return warm_policy(task, config), task.tokenizer()
    policy = loaded("model", arguments.model, lambda name: loading.causal_lm(name, config))
    return policy, loaded("model", arguments.model, lambda _: loading.tokenizer(None, policy))


def load_guided(task: Task | None, arguments: ScriptArguments, config: QSharpConfig) -> dict[str, Any]:
    """Reference, tokenizer and guide, as the trainer's arguments."""
    assert isinstance(arguments, GuideArguments)
    reference, tokenizer = load_policy(task, arguments, config)
    guide = loaded("guide", arguments.guide, lambda name: load_guide(name, config))
    return {"model": reference, "processing_class": tokenizer, "guide": guide}


def load_models(task: Task | None, arguments: ScriptArguments, config: KLQConfig) -> dict[str, Any]:
    """Policy, tokenizer, reference and value function, as the trainer's arguments."""
    policy, tokenizer = load_policy(task, arguments, config)
    if arguments.value_model == COPY:  # as a backbone, with a head that starts at 0
        value = copy.deepcopy(policy)
    else:
        value = loaded("value_model", arguments.value_model, lambda name: loading.value_model(name, config, ()))
    reference = loaded("ref_model", arguments.ref_model, lambda name: loading.causal_lm(name, config))
    return {"model": policy, "processing_class": tokenizer, "ref_model": reference, "value_model": value}


def loaded(argument: str, name: str | None, load: Callable[[str], Any]) -> Any:
    """The folder or hub id as ``load`` reads it, None for None; a ValueError names the argument where it fails."""
    try:
        return None if name is None else load(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: cannot load {name!r}: {error}") from error


def warm_policy(task: Task, config: KLQConfig | QSharpConfig) -> Any:
    """The task's policy after supervised training, kept in ``output_dir`` for a run that goes on later."""
    place = Path(str(config.output_dir)) / "warm_start"
    with Progress(TextColumn("Warm start"), BarColumn(12), MofNCompleteColumn(), transient=True) as progress:
        bar = progress.add_task("")
        return warm_started(task, cache=place, progress=lambda n, of, _: progress.update(bar, completed=n, total=of))


def task_data(task: Task, arguments: ScriptArguments, config: KLQConfig | QSharpConfig) -> tuple[Any, Any]:
    size = arguments.max_samples or getattr(config, "total_episodes", None) or 4096
    held_out = task.dataset("eval", arguments.eval_size) if arguments.eval_size else None
    return task.dataset("train", size, config.seed), held_out


def load_data(arguments: ScriptArguments) -> tuple[Any, Any]:
    """(training prompts, held-out prompts or None); the two share no row."""
    train = read_prompts(arguments, SOURCE, arguments.max_samples)
    if arguments.eval_split is not None:
        return train, read_prompts(arguments, SOURCE | {"split": "eval_split"}, arguments.eval_size or None)
    if arguments.eval_size == 0:
        return train, None
    require(arguments.eval_size < len(train), "eval_size", f"must be less than the {len(train)} prompts there are")
    parts = train.train_test_split(test_size=arguments.eval_size, seed=0)
    return parts["train"], parts["test"]


def read_prompts(arguments: ScriptArguments, source: dict[str, str], size: int | None) -> Any:
    """At most ``size`` prompts. ``source`` says which of our arguments gives each of those of ``load_prompts``.

    Raises:
        ValueError: that of ``load_prompts``, which names the argument in front of its colon; here by our name for it.
    """
    given: dict[str, Any] = {theirs: getattr(arguments, ours) for theirs, ours in source.items()}
    try:
        return load_prompts(**given, max_samples=size)
    except ValueError as error:
        names, colon, message = str(error).partition(":")
        ours = re.sub(r"\w+", lambda word: source.get(word[0], word[0]), names)
        raise ValueError(f"{ours}{colon}{message}") from error


def lora(arguments: ScriptArguments) -> Any:
    """The PEFT configuration, or None."""
    if arguments.lora_rank == 0:
        return None
    from peft import LoraConfig

    targets: Any = arguments.lora_target_modules
    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,  # type: ignore[arg-type]
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )


def load_function(name: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` or ``file.py:function`` names."""
    where, _, function = name.rpartition(":")
    require(bool(where), "reward_function", f"must be package.module:function or file.py:function, got {name!r}")
    try:
        found = getattr(load_module(where), function)
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"reward_function: cannot load {name!r}: {error}") from error
    require(callable(found), "reward_function", f"{name!r} is not a function")
    return found


def load_module(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The run


class ProgressBar(TrainerCallback):
    """One line: the steps done, and the last log in short."""

    def __init__(self, console: Console) -> None:
        columns = BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=console)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.start()
        self.bar = self.progress.add_task("", total=state.max_steps, completed=state.global_step, status="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for sign, status in (("objective/kl", STATUS), ("guide/explained_variance", GUIDE_STATUS)):
            if logs and sign in logs:
                self.progress.update(self.bar, status=status.format(**logs))


class AtBeginning(TrainerCallback):
    """Does something once the model is ready to train, on all processes."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.do()


@contextmanager
def progress_bar(trainer: KLQTrainer | QSharpTrainer, console: Console) -> Iterator[None]:
    """In place of transformers' bar, for the process that prints; lines only with ``disable_tqdm``."""
    if trainer.args.disable_tqdm or not trainer.is_world_process_zero():
        yield
        return
    bar = ProgressBar(console)
    trainer.add_callback(bar)
    try:
        yield
    finally:
        bar.progress.stop()


@contextmanager
def no_other_bars() -> Iterator[None]:
    """Keeps transformers' bars off ("Writing model shards"): they would write over ours, or say nothing beside them."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if shown:
        enable_progress_bars()  # those of downloads, which were turned off as well, and may take minutes
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@no_other_bars()
def run(arguments: ScriptArguments, config: KLQConfig | QSharpConfig) -> dict[str, dict[str, float]]:
    """Trains, and writes everything into ``config.output_dir``.

    Returns:
        the held-out results, ``{"before": {...}, "after": {...}}``; empty without held-out prompts.

    Raises:
        ValueError: before any work, where ``output_dir`` cannot be written into, or holds complete checkpoints that
            the run is not told to go on from: a later ``--resume`` could not tell them from its own.
    """
    out = Path(str(config.output_dir))
    usable_folder("output_dir", out)
    checkpoint = last_complete_checkpoint(out)
    require(
        checkpoint is None or arguments.resume,
        "output_dir",
        f"{out} holds checkpoints of another run: pass --resume to go on, or choose another folder",
    )
    trainer = build_trainer(arguments, config)
    trainer.remove_callback(ProgressCallback)  # transformers' bar
    console = Console(quiet=not trainer.is_world_process_zero())
    console.print(f"Going on from {checkpoint}" if checkpoint else f"Training into {out}", soft_wrap=True)
    held_out = HeldOut(trainer, None if arguments.task is None else load_task(arguments.task), console)
    if shards_weights(trainer.accelerator):  # no process can run the model before
        trainer.add_callback(AtBeginning(lambda: held_out.measure("before")))
    else:
        held_out.measure("before")
    written: list[Path] = []
    try:
        with progress_bar(trainer, console):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(out / "final"))
        written.append(out / "final")
        held_out.measure("after")
        written.append(write_json(trainer, out / "summary.json", held_out.results))
    finally:  # also after Ctrl-C: what was learnt so far is there to see
        written += write_history(trainer, out)
        show(console, held_out.results, written)
    return held_out.results


def write_history(trainer: KLQTrainer | QSharpTrainer, out: Path) -> list[Path]:
    """``history.json`` and, once something has been logged, ``training.png``."""
    history = trainer.state.log_history
    written = [write_json(trainer, out / "history.json", history)]
    if trainer.is_world_process_zero() and any("objective/scores" in logs or "round" in logs for logs in history):
        from .plots import plot_guide, plot_run

        if isinstance(trainer, KLQTrainer):
            plot_run(history, out / "training.png", tau=trainer.args.tau)
        else:
            plot_guide(history, out / "training.png")
        written.append(out / "training.png")
    return written


def write_json(trainer: KLQTrainer | QSharpTrainer, path: Path, content: Any) -> Path:
    if trainer.is_world_process_zero():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def show(console: Console, results: dict[str, dict[str, float]], written: list[Path]) -> None:
    from ...lab.display import rich_table

    if results:
        names = [name for name in next(iter(results.values())) if "/" not in name]
        rows = [[when, *(f"{found[name]:.3f}" for name in names)] for when, found in results.items()]
        console.print(rich_table("Held-out prompts", ("", *names), rows))
    console.print("Written: " + ", ".join(map(str, written)), soft_wrap=True)
