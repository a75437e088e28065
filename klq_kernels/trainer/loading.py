"""Models, tokenizers and datasets as the trainer's users give them: objects, paths, hub ids; and the checks on them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ..layout import require
from .config import KLQConfig


def causal_lm(model: str | nn.Module, config: KLQConfig) -> nn.Module:
    """A policy or a reference."""
    if isinstance(model, str):
        return AutoModelForCausalLM.from_pretrained(model, **init_kwargs(config))
    return model


def value_model(model: str | nn.Module | None, config: KLQConfig) -> nn.Module | None:
    """A value model: where a path is given, a sequence-classification model with one label."""
    if isinstance(model, str):
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **init_kwargs(config))
    return model


def init_kwargs(config: KLQConfig) -> dict[str, Any]:
    """``model_init_kwargs``, which transformers has parsed where it was given as JSON."""
    return dict(config.model_init_kwargs or {})  # type: ignore[arg-type]


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
    """Raises a ValueError unless a dataset, or each of a dict of them, has rows with a prompt."""
    require(dataset is not None, name, "is needed: a dataset with a column 'prompt'")
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        require(hasattr(part, "__len__"), name, "must have a length (a stream has none; take some of it first)")
        require(len(part) > 0, name, "is empty")
        require("prompt" in part[0], name, f"must have a column 'prompt', has {', '.join(part[0])}")
