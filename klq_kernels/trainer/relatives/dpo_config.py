"""``DPOConfig``: the arguments of a run of DPO or TDPO, beside those of ``transformers.TrainingArguments``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from ...call.checks import require, require_number
from ..config import FLOATS, PLACEMENTS, UNUSED, option

LOSSES = ("dpo", "tdpo1", "tdpo2")


@dataclass
class DPOConfig(TrainingArguments):
    """Arguments of ``DPOTrainer``; the defaults are the papers' (arXiv 2305.18290, 2404.11999), where they name one.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    learning_rate: float = option(1e-6, "Initial learning rate.")
    logging_steps: float = option(10, "Log every so many optimizer steps.")
    remove_unused_columns: bool = option(False, "Must stay False: the trainer reads the columns itself.")
    ddp_find_unused_parameters: bool | None = option(False, "True for a policy with parameters it does not use.")

    loss: str = option("dpo", f"One of {', '.join(LOSSES)}.")
    beta: float = option(0.1, "Units of reward per nat of log-ratio to the reference, > 0.")
    alpha: float = option(0.5, "tdpo2: weight of the divergences' difference, >= 0.")
    temperature: float = option(1.0, "Of the policy that is trained, and of the reference.")

    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, "Further arguments of the tokenizer's apply_chat_template, such as enable_thinking."
    )
    max_prompt_length: int | None = option(None, "Longer prompts are cut on the left.")
    max_completion_length: int | None = option(None, "Longer completions are cut on the right.")

    disable_dropout: bool = option(True, "No dropout: policy and reference are compared as they are.")
    ref_placement: str | None = option(
        None, "Where the reference's weights are: on the 'device', which is the default; on the 'cpu' between uses."
    )
    ref_dtype: str | None = option(
        None, "Weights of the reference, such as 'bfloat16' for half the memory; by default those of the model."
    )
    padding_free: bool | None = option(
        None, "Concatenate sequences instead of padding them; by default where attention is FlashAttention."
    )
    fp32_head: bool = option(
        False, "Logits in fp32 where the model runs in 16 bits (logits_dtype of linear_logprobs and linear_kl)."
    )
    workspace_bytes: int | None = option(None, "Memory for one chunk of logits (see linear_logprobs).")
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "For from_pretrained, where models are given as ids; their dtype is float32 unless given here."
    )

    _VALID_DICT_FIELDS = [  # noqa: RUF012  (as the parent declares it)
        *TrainingArguments._VALID_DICT_FIELDS,
        "chat_template_kwargs",
        "model_init_kwargs",
    ]

    def __post_init__(self) -> None:
        self._check()
        super().__post_init__()

    @property
    def compares_laws(self) -> bool:
        """Whether the loss reads divergences over the whole vocabulary."""
        return self.loss != "dpo"

    @property
    def logits_dtype(self) -> torch.dtype | None:
        """``logits_dtype`` of ``linear_logprobs`` and ``linear_kl``."""
        return torch.float32 if self.fp32_head else None

    @property
    def reference_dtype(self) -> torch.dtype | None:
        """``ref_dtype`` as torch knows it."""
        return getattr(torch, self.ref_dtype) if self.ref_dtype else None

    def _check(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "loss": LOSSES,
            "ref_placement": (None, *PLACEMENTS),
            "ref_dtype": (None, *FLOATS),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in known, name, f"must be one of {', '.join(str(k) for k in known if k)}; got {value!r}")
        require(self.remove_unused_columns is False, "remove_unused_columns", "must be False: columns are read here")
        for name in ("neftune_noise_alpha", "label_smoothing_factor"):
            default = getattr(TrainingArguments, name)
            require(getattr(self, name) == default, name, f"has no effect and must stay {default}: {UNUSED[name]}")
        for name in ("beta", "temperature"):
            require_number(name, getattr(self, name), positive=True)
        require_number("alpha", self.alpha, low=0.0)
        for name in ("max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            require(value is None or (isinstance(value, int) and value >= 1), name, f"must be at least 1, got {value}")
