"""The arguments of ``klq train``: where each value comes from.

A value comes from a flag, else from the YAML file, else from the recipe of the built-in task, else it is the default.
All names are those of ``ScriptArguments`` (what to train on what) and of the algorithm's configuration (how), which is
``KLQConfig``, that of a relative on the same cycle, or ``QSharpConfig`` with ``GuideArguments``. A name that is neither
is an error, because a misspelt hyperparameter that is silently ignored costs a run.
"""

from __future__ import annotations

from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from ...call.checks import require
from ...lab.tasks import TASKS, load_task
from ...trainer.config import KLQConfig
from ...trainer.loading import read_yaml
from ...trainer.options import option
from ...trainer.qsharp import QSharpConfig
from ...trainer.relatives import CYCLES

DEFAULT_OUTPUT = "klq_output"
COPY = "copy"  # as a value model
QSHARP = "qsharp"
Config = KLQConfig | QSharpConfig

# Settings with which the built-in tasks learn within a few minutes on a CPU; each can be overridden.
RECIPE: dict[str, Any] = {
    "learning_rate": 1e-4, "value_learning_rate": 1e-3, "value_model": COPY, "lr_scheduler_type": "constant",
    "num_update_epochs": 2, "num_mini_batches": 2, "per_device_train_batch_size": 32, "bootstrap_truncated": False,
    "use_cpu": True, "total_episodes": 64 * 120, "save_steps": 80, "save_total_limit": 2, "eval_size": 256,
}  # fmt: skip

GUIDE_RECIPE: dict[str, Any] = {
    "learning_rate": 1e-3, "law": "categorical", "eta": 0.2, "rounds": 2, "steps_per_round": 200,
    "prompts_per_round": 256, "samples_per_prompt": 16, "rollout_forward_batch_size": 256, "use_cpu": True,
    "save_steps": 100, "save_total_limit": 2, "eval_size": 256,
}  # fmt: skip


@dataclass
class ScriptArguments:
    """The model and the data."""

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
    demonstrations: str | None = option(
        None,
        "Completions to learn from (columns prompt, completion): a file, a folder or a hub id. With replay_cycles.",
    )
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


@dataclass
class GuideArguments(ScriptArguments):
    """Those of a guide for a model that stays as it is."""

    algorithm: str = option(QSHARP, "'qsharp': train a guide, and leave the model as it is.")
    guide: str | None = option(
        None, "The guide's backbone, or a guide to go on from: a folder or hub id; by default a copy of the model's."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ref_model", "value_model", "lora_rank", "demonstrations"):
            default = ScriptArguments.__dataclass_fields__[name].default
            require(getattr(self, name) == default, name, "is not used by qsharp, which trains a guide alone")


class Parser(HfArgumentParser):
    """Complains with a ValueError, as everything here does."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def config_class(flags: Sequence[str], given: Mapping[str, Any] | None = None) -> type[Config]:
    """The configuration of the algorithm that the flags name, or the values ``given`` in a file.

    Raises:
        ValueError: where there is no such algorithm.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algorithm", nargs="?", default=(given or {}).get("algorithm", KLQConfig.algorithm))
    algorithm = first.parse_known_args(list(flags))[0].algorithm
    names = (*KLQConfig.algorithms, *CYCLES, QSHARP)
    require(algorithm in names, "algorithm", f"must be one of {', '.join(names)}; got {algorithm!r}")
    if algorithm == QSHARP:
        return QSharpConfig
    return CYCLES[algorithm].config_class if algorithm in CYCLES else KLQConfig


def argument_parser(config: type[Config] = KLQConfig) -> Parser:
    """Every field of both dataclasses as a flag; the help shows ours, and names where the others are documented."""
    what = GuideArguments if issubclass(config, QSharpConfig) else ScriptArguments
    parser = Parser(
        [what, config],  # type: ignore[list-item]
        prog="klq train",
        usage="klq train [--config FILE.yaml] [--NAME VALUE ...]",
        description="Train a model with KLQ or a relative, or a guide for one (--algorithm NAME; with --help, its "
        "arguments). The names below are also the keys of the YAML file.",
        epilog="So are all fields of transformers.TrainingArguments.",
        allow_abbrev=False,
    )
    ours = {name for kind in config.__mro__ if issubclass(kind, Config) for name in kind.__annotations__}
    inherited = {f.name for f in fields(TrainingArguments)} - ours - {"output_dir", "seed"}
    for action in parser._actions:
        if action.dest in inherited or action.option_strings[0].startswith("--no_"):
            action.help = SUPPRESS
    parser.set_defaults(output_dir=DEFAULT_OUTPUT)
    return parser


def parse(config: Path | None, flags: Sequence[str]) -> tuple[ScriptArguments, Config]:
    """The arguments of a run.

    Args:
        config: a YAML file of names and values, or None.
        flags: ``["--name", "value", ...]``; they override the file.

    Raises:
        ValueError: naming the key or flag that is unknown (with the nearest that exists) or has a bad value.
    """
    given = {} if config is None else read_yaml(config)
    kind = config_class(flags, given)
    parser = argument_parser(kind)
    actions = {action.dest: action for action in reversed(parser._actions)}
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
        suited = recipe(known.task, {*values, *flagged}, kind)
        parser.set_defaults(**{name: value for name, value in suited.items() if name not in values})
    arguments, training = parser.parse_args_into_dataclasses(list(flags), look_for_args_file=False)
    return arguments, training


def recipe(task: str, given: Collection[str], kind: type[Config] = KLQConfig) -> dict[str, Any]:
    """Settings that suit a built-in task; its own length of a run only where none of the ``given`` names sets one.

    Those of a value function are left out where the algorithm has no critic.
    """
    length = load_task(task).max_completion_length
    if issubclass(kind, QSharpConfig):
        return {**GUIDE_RECIPE, "max_completion_length": length}
    settings = {**RECIPE, "max_completion_length": length}
    if not kind.has_critic:
        del settings["value_model"], settings["value_learning_rate"]
    if "max_steps" in given or "num_train_epochs" in given:
        del settings["total_episodes"]
    return settings


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
