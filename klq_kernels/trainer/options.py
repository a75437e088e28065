"""The arguments that several trainers here have, beside those of ``transformers.TrainingArguments``.

``BaseConfig`` is of all of them, ``SamplingConfig`` of those that sample completions and have them scored, and
``PolicyConfig`` of those that train a policy against a reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from ..call.checks import require, require_number

FLOATS = ("float32", "bfloat16", "float16")
UNUSED = {  # arguments of the parent without effect here, and what to set instead
    "auto_find_batch_size": "lower per_device_train_batch_size and raise gradient_accumulation_steps instead",
    "neftune_noise_alpha": "noise on the embeddings would make another policy learn than the one that sampled",
    "label_smoothing_factor": "the losses of reinforcement learning have no labels",
    "per_device_eval_batch_size": "evaluation takes its batches from rollout_forward_batch_size",
    "train_sampling_strategy": "the order of the prompts is a function of the seed",
    "dataloader_drop_last": "every cycle, and every round, is whole",
    "dataloader_num_workers": "rows are read by the trainer itself, those of a cycle as it begins",
    "dataloader_persistent_workers": "rows are read by the trainer itself",
    "dataloader_prefetch_factor": "rows are read by the trainer itself",
    "bf16_full_eval": "evaluation samples and scores in the precision of training; set bf16",
    "include_num_input_tokens_seen": "the tokens of a batch are not counted",
    "fp16_full_eval": "evaluation samples and scores in the precision of training; set fp16",
}
DATA_LOADER = (  # those of them that a trainer does use which leaves the data to transformers
    "train_sampling_strategy", "dataloader_drop_last", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
)  # fmt: skip


def option(default: Any, text: str) -> Any:
    """A field with the help text that the command line shows."""
    return field(default=default, metadata={"help": text})


def check_counts(args: TrainingArguments, names: Iterable[str]) -> None:
    """Raises a ValueError unless each of these is None or a whole number of 1 or more."""
    for name in names:
        value = getattr(args, name)
        require(value is None or (isinstance(value, int) and value >= 1), name, f"must be at least 1, got {value}")


@dataclass
class BaseConfig(TrainingArguments):
    """Which texts are read, and by which models.

    Raises:
        ValueError: naming the argument that is out of range, or that would have no effect.
    """

    remove_unused_columns: bool = option(False, "Must stay False: the columns are read as they are.")

    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, "Further arguments of the tokenizer's apply_chat_template for prompts, such as enable_thinking."
    )
    max_prompt_length: int | None = option(None, "Longer prompts are cut on the left.")
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "For from_pretrained, where models are given as ids; their dtype is float32 unless given here."
    )

    used: ClassVar[tuple[str, ...]] = ()  # of ``UNUSED``, what this trainer does use
    _VALID_DICT_FIELDS = [  # noqa: RUF012  (as the parent declares it)
        *TrainingArguments._VALID_DICT_FIELDS,
        "chat_template_kwargs",
        "model_init_kwargs",
    ]

    def __post_init__(self) -> None:
        self._check_unused()
        check_counts(self, ("max_prompt_length", "per_device_train_batch_size", "gradient_accumulation_steps"))
        super().__post_init__()  # which parses what was given as JSON
        for name in ("add_generation_prompt", "tokenize"):
            given = name in (self.chat_template_kwargs or {})
            require(not given, "chat_template_kwargs", f"must not hold {name}, which the trainer sets")
        for name in ("split_batches", "dispatch_batches"):
            given = bool(getattr(self.accelerator_config, name))
            require(not given, "accelerator_config", f"must not set {name}: each process reads rows of its own")

    def _check_unused(self) -> None:
        require(self.remove_unused_columns is False, "remove_unused_columns", "must be False: all columns are read")
        for name, instead in UNUSED.items():
            value, default = getattr(self, name), getattr(TrainingArguments, name)
            unset = name in self.used or value == default or (default == "no" and value is False)
            require(unset, name, f"has no effect and must stay {default}: {instead}")

    def _check_choice(self, name: str, choices: Iterable[str | None]) -> None:
        """Raises a ValueError unless an argument is one of its ``choices``."""
        value, names = getattr(self, name), ", ".join(c for c in choices if c is not None)
        require(value in choices, name, f"must be one of {names}; got {value!r}")


@dataclass
class SamplingConfig(BaseConfig):
    """How completions are sampled and scored."""

    max_completion_length: int = option(128, "Tokens to generate at most.")
    temperature: float = option(1.0, "Of sampling and, the same, of the policy that is trained.")
    generation_kwargs: dict[str, Any] | str | None = option(
        None,
        "Further GenerationConfig arguments, but for the temperature. top_k, top_p and penalties sample from another "
        "policy than the trained one.",
    )
    rollout_forward_batch_size: int = option(
        64, "Sequences per generate call and per scoring pass, also in evaluation."
    )
    reward_weights: list[float] | None = option(None, "One weight per reward function; by default 1.")

    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "generation_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        check_counts(self, ("max_completion_length", "rollout_forward_batch_size"))
        require_number("temperature", self.temperature, positive=True)
        measured = self.load_best_model_at_end or self.lr_scheduler_type == "reduce_lr_on_plateau"
        if measured and self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = "reward", True
        super().__post_init__()


@dataclass
class PolicyConfig(BaseConfig):
    """How a policy and its reference compute."""

    disable_dropout: bool = option(True, "No dropout: policy and reference are compared token by token.")
    ref_dtype: str | None = option(
        None, "Weights of the reference, such as 'bfloat16' for half the memory; by default those of the model."
    )
    padding_free: bool | None = option(
        None, "Concatenate sequences instead of padding them; by default where attention is FlashAttention."
    )
    fp32_head: bool = option(
        False,
        "Logits in fp32 where the model runs in 16 bits, as samplers with an fp32 head have them (logits_dtype of "
        "fused_klq_loss).",
    )
    workspace_bytes: int | None = option(None, "Memory for one chunk of logits (see fused_klq_loss).")

    def __post_init__(self) -> None:
        self._check_choice("ref_dtype", (None, *FLOATS))
        super().__post_init__()

    @property
    def logits_dtype(self) -> torch.dtype | None:
        """``logits_dtype`` of ``fused_klq_loss`` and ``linear_logprobs``."""
        return torch.float32 if self.fp32_head else None

    @property
    def torch_ref_dtype(self) -> torch.dtype | None:
        """``ref_dtype`` as PyTorch has it."""
        return None if self.ref_dtype is None else getattr(torch, self.ref_dtype)
