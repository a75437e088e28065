"""``klq train``: from a YAML file and flags to a trained model, the history of the run and a picture of it.

A value comes from a flag, else from the YAML file, else from the recipe of the built-in task, else it is the default.
All names are those of ``ScriptArguments`` (what to train on what) and ``KLQConfig`` (how); a name that is neither is
an error, because a misspelt hyperparameter that is silently ignored costs a run.

What a run leaves in ``output_dir``, also one that was interrupted: ``history.json`` (every log), ``training.png``,
checkpoints; and once it is through ``final/`` (the model) and ``summary.json`` (held-out results, before and after).
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import re
from argparse import SUPPRESS, Action
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate.utils import gather_object
from huggingface_hub.utils import enable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import HfArgumentParser, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..layout import require
from ..tasks import TASKS, Task, load_task, warm_started
from . import loading
from .config import KLQConfig, option
from .data import keep_short, load_prompts
from .seeds import Purpose, derived_seed
from .trainer import KLQTrainer, last_complete_checkpoint

DEFAULT_OUTPUT = "klq_output"
COPY = "copy"  # as a value model
SOURCE = {"path": "dataset", "name": "dataset_name", "split": "dataset_split", "kind": "dataset_kind"}  # of prompts
STATUS = "reward {objective/scores:.3f}  KL {objective/kl:.2f}  H {policy/entropy_avg:.2f}"
STATUS += "  len {completions/mean_length:.0f}  EV {val/explained_variance:.2f}"

# What makes the built-in tasks learn within a few minutes on a CPU; any of it can be overridden.
RECIPE: dict[str, Any] = {
    "learning_rate": 1e-4, "value_learning_rate": 1e-3, "value_model": COPY, "lr_scheduler_type": "constant",
    "num_update_epochs": 2, "num_mini_batches": 2, "per_device_train_batch_size": 32, "bootstrap_truncated": False,
    "use_cpu": True, "total_episodes": 64 * 120, "save_steps": 80, "save_total_limit": 2, "eval_size": 256,
}  # fmt: skip


@dataclass
class ScriptArguments:
    """What is trained on what."""

    task: str | None = option(
        None,
        f"A built-in task: {', '.join(TASKS)}. It brings model, prompts, rewards and settings, and "
        "trains on the CPU, which takes minutes; --use_cpu False trains on the GPU.",
    )
    model: str | None = option(None, "The policy: a folder or hub id. With a task: in place of its own.")
    ref_model: str | None = option(None, "The reference; by default the policy as it is now.")
    value_model: str | None = option(
        None, "A value function: a folder or hub id, or copy: a second copy of the policy. Default: a head."
    )
    dataset: str | None = option(None, "Prompts: a file, a folder or a hub id.")
    dataset_kind: str = option("prompt", "prompt, tldr or hh.")
    dataset_name: str | None = option(None, "The configuration of the data set, where it has several.")
    dataset_split: str = option("train", "The split to train on.")
    eval_split: str | None = option(None, "The split to evaluate on; by default eval_size rows of the training split.")
    eval_size: int = option(0, "Held-out prompts, evaluated before and after; 0: none.")
    max_samples: int | None = option(None, "Train on the first so many rows.")
    drop_long_prompts: bool = option(False, "Leave out prompts over max_prompt_length instead of cutting them.")
    reward_model: list[str] | None = option(None, "Sequence-classification models: folders or hub ids.")
    reward_function: list[str] | None = option(None, "package.module:function or file.py:function, one or more.")
    lora_rank: int = option(0, "Rank of LoRA adapters; 0 trains every parameter.")
    lora_alpha: float = option(16.0, "Scale of the adapters.")
    lora_target_modules: list[str] | None = option(None, "Modules that get adapters, or all-linear.")
    resume: bool = option(False, "Go on from the last complete checkpoint in output_dir, if there is one.")

    def __post_init__(self) -> None:
        if self.task is None:
            require(self.model is not None, "model", "is needed (or a built-in task)")
            require(self.dataset is not None, "dataset", "is needed (or a built-in task)")
            rewarded = bool(self.reward_model or self.reward_function)
            require(rewarded, "reward_model", "or reward_function is needed (or a built-in task)")
        else:
            load_task(self.task)
            require(self.dataset is None, "dataset", f"is not used: the task {self.task} has its own")
        require(self.lora_rank >= 0, "lora_rank", f"must not be negative, got {self.lora_rank}")
        require(self.eval_size >= 0, "eval_size", f"must not be negative, got {self.eval_size}")
        enough = self.max_samples is None or self.max_samples >= 1
        require(enough, "max_samples", f"must be at least 1, got {self.max_samples}")


# Arguments


class Parser(HfArgumentParser):
    """Complains with a ValueError, as everything here does."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def argument_parser() -> Parser:
    """Every field of both dataclasses as a flag; the help shows ours, and names where the others are documented."""
    parser = Parser(
        [ScriptArguments, KLQConfig],  # type: ignore[list-item]
        prog="klq train",
        usage="klq train [--config FILE.yaml] [--NAME VALUE ...]",
        description="Train a language model with KLQ. The names below are also the keys of the YAML file.",
        epilog="So are all fields of transformers.TrainingArguments.",
        allow_abbrev=False,
    )
    inherited = {f.name for f in fields(TrainingArguments)} - set(KLQConfig.__annotations__) - {"output_dir", "seed"}
    for action in parser._actions:
        if action.dest in inherited or action.option_strings[0].startswith("--no_"):
            action.help = SUPPRESS
    parser.set_defaults(output_dir=DEFAULT_OUTPUT)
    return parser


def parse(config: Path | None, flags: Sequence[str]) -> tuple[ScriptArguments, KLQConfig]:
    """The arguments of a run.

    Args:
        config: a YAML file of names and values, or None.
        flags: ``["--name", "value", ...]``; they override the file.

    Raises:
        ValueError: naming the key or flag that is unknown (with the nearest that exists) or has a bad value.
    """
    parser = argument_parser()
    actions = {action.dest: action for action in reversed(parser._actions)}
    given = {} if config is None else read_yaml(config)
    for key in given:
        require(key in actions, "config", f"{config} has an unknown key {key!r}{near(key, actions)}")
    values = {key: as_default(actions[key], value) for key, value in given.items()}
    parser.set_defaults(**values)
    known, unknown = parser.parse_known_args(list(flags))
    if unknown:
        name = unknown[0].partition("=")[0]
        raise ValueError(f"{name}: unknown argument{near(name.lstrip('-').replace('-', '_'), actions, '--')}")
    if known.task is not None:
        flagged = {a.dest for a in parser._actions for f in flags if f.partition("=")[0] in a.option_strings}
        suited = recipe(known.task, {*values, *flagged})
        parser.set_defaults(**{name: value for name, value in suited.items() if name not in values})
    arguments, training = parser.parse_args_into_dataclasses(list(flags), look_for_args_file=False)
    return arguments, training


def recipe(task: str, given: Collection[str]) -> dict[str, Any]:
    """Settings that suit a built-in task; its own length of a run only where none of the ``given`` names sets one."""
    settings = {**RECIPE, "max_completion_length": load_task(task).max_completion_length}
    if "max_steps" in given or "num_train_epochs" in given:
        del settings["total_episodes"]
    return settings


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"config: cannot read {path}: {error}") from error
    require(isinstance(content or {}, dict), "config", f"{path} must hold names and values")
    return content or {}


def near(name: str, names: Any, prefix: str = "") -> str:
    """A hint at the name that was perhaps meant."""
    match = get_close_matches(name, [*names], 1)
    return f"; did you mean {prefix}{match[0]}?" if match else ""


def as_default(action: Action, value: Any) -> Any:
    """A YAML value as an argparse default. Text is converted and checked like a flag (YAML reads 1e-5 as text)."""
    require(value is not None or action.default is None, "config", f"{action.dest} cannot be null")
    if value is None or isinstance(value, dict):
        return value
    if action.nargs == "+":
        convert: Any = action.type or str
        return [convert(entry) for entry in (value if isinstance(value, list) else [value])]
    require(not isinstance(value, list), "config", f"{action.dest} takes one value, got {value}")
    return str(value)


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


# The trainer


def build_trainer(arguments: ScriptArguments, config: KLQConfig) -> KLQTrainer:
    """The trainer that the arguments describe, with its data loaded."""
    task = None if arguments.task is None else load_task(arguments.task)
    train, held_out = task_data(task, arguments, config) if task is not None else load_data(arguments)
    rewards: list[Any] = [*(arguments.reward_model or []), *map(load_function, arguments.reward_function or [])]
    models = load_models(task, arguments, config)
    if arguments.drop_long_prompts and config.max_prompt_length is not None:
        train, held_out = (
            None if prompts is None else keep_short(prompts, models["processing_class"], config.max_prompt_length)
            for prompts in (train, held_out)
        )
    return KLQTrainer(
        **models,
        reward_funcs=rewards or list(task.reward_funcs),  # type: ignore[union-attr]
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=lora(arguments),
    )


def load_models(task: Task | None, arguments: ScriptArguments, config: KLQConfig) -> dict[str, Any]:
    """Policy, tokenizer, reference and value function, as the trainer's arguments."""
    if arguments.model is None:
        assert task is not None
        policy, tokenizer = warm_policy(task, config), task.tokenizer()
    else:
        policy = loaded("model", arguments.model, lambda name: loading.causal_lm(name, config))
        tokenizer = loaded("model", arguments.model, lambda _: loading.tokenizer(None, policy))
    if arguments.value_model == COPY:  # as a backbone, with a head that starts at 0
        value = copy.deepcopy(policy)
    else:
        value = loaded("value_model", arguments.value_model, lambda name: loading.value_model(name, config, ()))
    reference = loaded("ref_model", arguments.ref_model, lambda name: loading.causal_lm(name, config))
    return {"model": policy, "processing_class": tokenizer, "ref_model": reference, "value_model": value}


def loaded(argument: str, name: str | None, load: Callable[[str], Any]) -> Any:
    """What ``load`` makes of the folder or hub id, None of None; a ValueError names the argument where it fails."""
    try:
        return None if name is None else load(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: cannot load {name!r}: {error}") from error


def warm_policy(task: Task, config: KLQConfig) -> Any:
    """The task's policy after supervised training, kept in ``output_dir`` for a run that goes on later."""
    place = Path(str(config.output_dir)) / "warm_start"
    with Progress(TextColumn("Warm start"), BarColumn(12), MofNCompleteColumn(), transient=True) as progress:
        bar = progress.add_task("")
        return warm_started(task, cache=place, progress=lambda n, of, _: progress.update(bar, completed=n, total=of))


def task_data(task: Task, arguments: ScriptArguments, config: KLQConfig) -> tuple[Any, Any]:
    size = arguments.max_samples or config.total_episodes or 4096
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


# Held-out results


@dataclass
class HeldOut:
    """Judges a trainer's policy on held-out prompts, where it can against what the policy wrote before training."""

    trainer: KLQTrainer
    task: Task | None
    console: Console
    results: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        data: Any = self.trainer.eval_dataset
        self.rows: list[dict[str, Any]] = [] if data is None else list(data)
        self.baseline = self.answers(0) if self.task is not None and self.rows else None

    def answers(self, sample: int) -> list[str]:
        with self.bar("completions for the judge") as advance:
            return answers(self.trainer, self.rows, sample, advance)

    def measure(self, when: str) -> None:
        """Adds the results of the policy as it is now."""
        if not self.rows:
            return
        with self.bar(f"evaluation {when} training") as advance, each_turn(self.trainer, advance):
            found = self.trainer.evaluate()
        measured = {n.removeprefix("eval_"): value for n, value in found.items() if n.startswith("eval_")}
        if self.task is not None and self.baseline is not None:
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
def each_turn(trainer: KLQTrainer, then: Callable[[], None]) -> Iterator[None]:
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


def answers(
    trainer: KLQTrainer, rows: list[dict[str, Any]], sample: int, advance: Callable[[], None] | None = None
) -> list[str]:
    """One sampled completion for each row, as text, the same on any number of processes; every process must call it.

    Another ``sample``, other random numbers. ``advance`` is called after each batch of this process.
    """
    written: list[tuple[int, list[str]]] = []
    for turn in trainer.turns(len(rows)):
        seed = derived_seed(trainer.args.seed, Purpose.EVALUATION, 1 + sample, turn.rows.start)
        sequences = trainer.roll_out([rows[i] for i in turn.rows], seed).sequences
        texts = trainer.tokenizer.batch_decode([s.completion.tolist() for s in sequences], skip_special_tokens=True)
        if turn.kept:
            written.append((turn.rows.start, texts))
        if advance is not None:
            advance()
    return [text for _, texts in sorted(gather_object(written)) for text in texts]


def win_rate(task: Task, rows: list[dict[str, Any]], ours: list[str], theirs: list[str]) -> float:
    """How often the task's judge prefers our completion to theirs for the same prompt; a tie is half a win."""
    wins = 0.0
    for row, mine, other in zip(rows, ours, theirs, strict=True):
        a, b = (task.judge(row["prompt"], text, row) for text in (mine, other))
        wins += 1.0 if a > b else 0.5 if a == b else 0.0
    return wins / len(rows)


# The run


class ProgressBar(TrainerCallback):
    """One line: the steps done, and the last log in short."""

    def __init__(self, console: Console) -> None:
        columns = BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=console)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = self.progress.add_task("", total=state.max_steps, completed=state.global_step, status="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "objective/kl" in logs:
            self.progress.update(self.bar, status=STATUS.format(**logs))


@contextmanager
def progress_bar(trainer: KLQTrainer, console: Console) -> Iterator[None]:
    """In place of transformers' bar, for the process that prints; lines only with ``disable_tqdm``."""
    if trainer.args.disable_tqdm or not trainer.is_world_process_zero():
        yield
        return
    bar = ProgressBar(console)
    trainer.add_callback(bar)
    with bar.progress:
        yield


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
def run(arguments: ScriptArguments, config: KLQConfig) -> dict[str, dict[str, float]]:
    """Trains, and writes everything into ``config.output_dir``.

    Returns:
        the held-out results, ``{"before": {...}, "after": {...}}``; empty without held-out prompts.
    """
    out = Path(str(config.output_dir))
    trainer = build_trainer(arguments, config)
    trainer.remove_callback(ProgressCallback)  # transformers' bar
    console = Console(quiet=not trainer.is_world_process_zero())
    checkpoint = last_complete_checkpoint(out) if arguments.resume else None
    console.print(f"Going on from {checkpoint}" if checkpoint else f"Training into {out}", soft_wrap=True)
    held_out = HeldOut(trainer, None if arguments.task is None else load_task(arguments.task), console)
    held_out.measure("before")
    written: list[Path] = []
    try:
        with progress_bar(trainer, console):
            trainer.train(resume_from_checkpoint=checkpoint)
        held_out.measure("after")
        trainer.save_model(str(out / "final"))
        written = [out / "final", write_json(trainer, out / "summary.json", held_out.results)]
    finally:  # also after Ctrl-C: what was learnt so far is there to see
        written += write_history(trainer, out)
        show(console, held_out.results, written)
    return held_out.results


def write_history(trainer: KLQTrainer, out: Path) -> list[Path]:
    """``history.json`` and, once a cycle has been logged, ``training.png``."""
    history = trainer.state.log_history
    written = [write_json(trainer, out / "history.json", history)]
    if trainer.is_world_process_zero() and any("objective/scores" in logs for logs in history):
        from .plots import plot_run

        plot_run(history, out / "training.png", tau=trainer.args.tau)
        written.append(out / "training.png")
    return written


def write_json(trainer: KLQTrainer, path: Path, content: Any) -> Path:
    if trainer.is_world_process_zero():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def show(console: Console, results: dict[str, dict[str, float]], written: list[Path]) -> None:
    from ..display import rich_table

    if results:
        names = [name for name in next(iter(results.values())) if "/" not in name]
        rows = [[when, *(f"{found[name]:.3f}" for name in names)] for when, found in results.items()]
        console.print(rich_table("Held-out prompts", ("", *names), rows))
    console.print("Written: " + ", ".join(map(str, written)), soft_wrap=True)
