"""Models, tokenizers and datasets as the trainer's users give them: objects, paths, hub ids; and the checks on them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ..call.checks import renaming, require
from .data import check_prompt, columns_of


class Loading(Protocol):
    """The arguments of a run that say how models are loaded."""

    model_init_kwargs: Any  # for from_pretrained


def causal_lm(model: str | nn.Module, config: Loading) -> nn.Module:
    """A policy or a reference."""
    if isinstance(model, str):
        return AutoModelForCausalLM.from_pretrained(model, **init_kwargs(config))
    return model


def value_model(model: str | nn.Module | None, config: Loading, others: Iterable[Any]) -> nn.Module | None:
    """A value model: where a path is given, a sequence-classification model with one label.

    One that shares parameters with any of ``others`` is copied: training it must not change them.
    """
    if isinstance(model, str):
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **init_kwargs(config))
    require(
        model is None or isinstance(model, PreTrainedModel),
        "value_model",
        f"must be a transformers model, as it reads tokens itself; got {type(model).__name__}",
    )
    shared = model is not None and any(shares_parameters(model, o) for o in others if isinstance(o, nn.Module))
    return copy.deepcopy(model) if shared else model


def with_adapters(policy: Any, peft_config: Any) -> nn.Module:
    """The policy as a PEFT model."""
    from peft import PeftConfig, get_peft_model

    require(
        isinstance(peft_config, PeftConfig),
        "peft_config",
        f"must be a PEFT configuration such as LoraConfig(...), got {type(peft_config).__name__}",
    )
    return get_peft_model(policy, peft_config)


def check_vocabulary(name: str, size: int, policy_size: int) -> None:
    """Raises a ValueError where a model does not know every token of the policy."""
    require(size >= policy_size, name, f"has {size} tokens in its vocabulary, and the policy {policy_size}")


def check_trainable(policy: nn.Module, adapters: bool) -> None:
    """Raises a ValueError where no parameter of the policy is trained, or only those that quantisation has left."""
    require(any(p.requires_grad for p in policy.parameters()), "model", "is frozen: none of its parameters is trained")
    quantised = bool(getattr(policy, "is_quantized", False)) or any(
        not p.is_floating_point() for p in policy.parameters()
    )
    require(
        adapters or not quantised,
        "model",
        "is quantised, so that only its norms and embeddings would be trained; give a peft_config",
    )


def check_optimizer(optimizer: torch.optim.Optimizer | None, value: nn.Module) -> None:
    """Raises a ValueError where an optimiser from outside leaves the value function out."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in value.named_parameters() if p.requires_grad and id(p) not in held]
    require(
        not missing,
        "optimizers",
        f"holds no {', '.join(missing)} of the value function, which would stay as it is; leave optimizers out and set "
        "optim, learning_rate and value_learning_rate, or add trainer.actor_critic.value.parameters() to it",
    )


def shares_parameters(one: nn.Module, other: nn.Module, *, trained: bool = False) -> bool:
    """Whether two modules have a parameter in common; ``trained``: one that requires a gradient."""
    theirs = {id(p) for p in other.parameters()}
    return any(id(p) in theirs for p in one.parameters() if p.requires_grad or not trained)


def init_kwargs(config: Loading) -> dict[str, Any]:
    """``model_init_kwargs``, which transformers has parsed where it was given as JSON.

    The dtype is fp32 unless they say otherwise, whatever the checkpoint is stored in: most updates are smaller than
    half a step between two bf16 numbers, and would be rounded away.
    """
    given: dict[str, Any] = dict(config.model_init_kwargs or {})
    return given if "torch_dtype" in given else {"dtype": torch.float32, **given}


def warn_of_16_bit(name: str, model: nn.Module | None) -> None:
    """Warns where 16-bit weights are to be trained."""
    kinds = set() if model is None else {p.dtype for p in model.parameters() if p.requires_grad}
    for dtype in kinds & {torch.bfloat16, torch.float16}:
        warnings.warn(
            f"{name}: its weights are {dtype}, in which small updates are lost. Load it with dtype=torch.float32 and "
            "set bf16=True, which computes in 16 bits and keeps weights in fp32; or train adapters (peft_config).",
            stacklevel=4,
        )


def tokenizer(given: Any, policy: Any) -> Any:
    """The given tokenizer or the one saved with the policy, with a padding token.

    Raises:
        ValueError: where there is neither.
    """
    if given is None:
        name = getattr(policy.config, "_name_or_path", "")
        require(bool(name), "processing_class", "is needed: the model was not loaded from a path that has a tokenizer")
        given = AutoTokenizer.from_pretrained(name)
    if given.pad_token_id is None:
        given.pad_token = given.eos_token
    return given


def check_dataset(name: str, dataset: Any) -> None:
    """Raises a ValueError unless a dataset has rows with a prompt; ``eval_dataset`` may be a dict of several."""
    require(dataset is not None, name, "is needed: a dataset with a column 'prompt'")
    require(not isinstance(dataset, str), name, f"must be a dataset, got the text {dataset!r:.80}; load it first")
    several = isinstance(dataset, dict)
    require(not several or name == "eval_dataset", name, "must be one dataset, not a dict of several")
    for part in dataset.values() if several else [dataset]:
        require(
            hasattr(part, "__len__"),
            name,
            "must have a length, since epochs are shuffled and a resumed run finds its prompts again; of a stream take "
            "first what the run needs: Dataset.from_list(list(stream.take(10_000)))",
        )
        require(len(part) > 0, name, "is empty")
        require("prompt" in part[0], name, f"must have a column 'prompt', has {', '.join(part[0])}")
        for row, prompt in enumerate(column_of(part, "prompt")):
            check_prompt(prompt, f"{name}: prompt of row {row}")
        if isinstance(part, (list, tuple)):
            with renaming({"dataset": name}):
                columns_of(part)


def column_of(dataset: Any, name: str) -> Iterable[Any]:
    """A column of a table or of a list of rows; nothing of a dataset that computes its rows as they are asked for."""
    if hasattr(dataset, "column_names"):
        computed = getattr(dataset, "format", {}).get("type") == "custom"  # set_transform
        return dataset[name] if name in dataset.column_names and not computed else ()
    return (row.get(name) for row in dataset) if isinstance(dataset, (list, tuple)) else ()


def read_yaml(path: Path) -> dict[str, Any]:
    """Names and values from a YAML file. Raises ValueError where it cannot be read or holds something else."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"config: cannot read {path}: {error}") from error
    require(isinstance(content or {}, dict), "config", f"{path} must hold names and values")
    return content or {}
