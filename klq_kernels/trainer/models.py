"""What the trainer needs to know of a causal language model: where its hidden states end and its lm_head begins.

The logits of a supported model are  z = softcap((hidden @ weight.T + bias) * scale), with every part but the weight
optional: softcap (Gemma), scale (Cohere, Granite), a weight tied to the embeddings, LoRA on the head (its update is
added to the weight). ``LanguageModel`` finds these parts and proves on a few tokens that they give the model's own
log-probabilities, so that a model with another kind of head is refused at once instead of being trained wrongly.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..call.checks import require
from ..logprobs import linear_logprobs
from .batches import Inputs


class Head(NamedTuple):
    """An lm_head as arguments of ``linear_logprobs`` and ``fused_klq_loss``; the weight is [V, H], the bias [V]."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    temperature: float


class LanguageModel:
    """The parts of a causal language model, or of a PEFT model around one. Holds no parameters of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.is_peft = hasattr(model, "get_base_model") and hasattr(model, "disable_adapter")
        causal_lm: Any = model.get_base_model() if self.is_peft else model  # type: ignore[operator]
        name = type(causal_lm).__name__
        require(isinstance(causal_lm, PreTrainedModel), "model", f"must be a transformers causal LM, got {name}")
        self._lm_head = causal_lm.get_output_embeddings()
        require(self._lm_head is not None, "model", f"{name} has no lm_head (get_output_embeddings() is None)")
        self.backbone = causal_lm.base_model
        require(self.backbone is not causal_lm, "model", f"{name} does not separate its backbone from its lm_head")
        self.config = causal_lm.config.get_text_config()
        self._softcap = getattr(self.config, "final_logit_softcapping", None)
        self._scale = getattr(self.config, "logit_scale", None) or 1.0  # Cohere multiplies
        self._scale /= getattr(self.config, "logits_scaling", None) or 1.0  # Granite divides
        require(
            self._softcap is None or self._scale == 1.0, "model", f"{name} has a logit scale and a softcap: unsupported"
        )

    def hidden_states(self, inputs: Inputs) -> Tensor:
        """Last hidden states (after the final norm), one row per position of the batch: [B * L, H]."""
        return backbone_states(self.backbone, inputs)

    def head(self, temperature: float = 1.0) -> Head:
        """The head for a policy that samples at ``temperature``."""
        weight, bias = head_parameters(self._lm_head)
        return Head(weight, bias, self._softcap, temperature / self._scale)

    def without_adapters(self) -> AbstractContextManager[Any]:
        """Inside, a PEFT model is its base model: the reference policy."""
        return self.model.disable_adapter() if self.is_peft else nullcontext()  # type: ignore[operator]

    @torch.no_grad()
    def prove(self) -> None:
        """Holds the parts against the whole on a few tokens.

        Raises:
            ValueError: where they disagree, because the model does something else with its logits.
        """
        was_training = self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device
        ids = torch.arange(4, device=device).remainder(self.config.vocab_size).unsqueeze(0)
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        head = self.head()
        logits = self.model(input_ids=ids, use_cache=False).logits.float()
        unlikely = logits.argmin(-1)  # farthest from the normaliser: another scale or cap shows most there
        ours = linear_logprobs(hidden, **head._asdict(), actions=unlikely).logprobs
        self.model.train(was_training)
        theirs = logits.log_softmax(-1).gather(-1, unlikely.unsqueeze(-1)).squeeze(-1)
        tolerance = max(1e-3, 4 * torch.finfo(head.weight.dtype).eps)  # in 16 bits every step rounds the logits
        error = (ours - theirs).abs().max().item()
        require(
            error <= 1e-3 + tolerance * logits.abs().max().item(),
            "model",
            f"{type(self.model).__name__} is not supported: its log-probabilities are not those of "
            f"softcap(lm_head(hidden) * scale); they differ by {error:.3g} on a probe",
        )


def backbone_states(backbone: nn.Module, inputs: Inputs) -> Tensor:
    """Last hidden states of a backbone, [B * L, H]."""
    out = backbone(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids,
        use_cache=False,
    )
    return out.last_hidden_state.flatten(0, 1)


def head_parameters(lm_head: Any) -> tuple[Tensor, Tensor | None]:
    """(weight [V, H], bias [V] or None) that an lm_head multiplies with, PEFT's additions included.

    Raises:
        ValueError: where it is no linear layer, or has an adapter that is no sum of matrices.
    """
    if hasattr(lm_head, "modules_to_save"):  # PEFT trains a copy of the whole layer
        plain = lm_head.disable_adapters or not lm_head.modules_to_save
        return head_parameters(
            lm_head.original_module if plain else lm_head.modules_to_save[lm_head.active_adapters[0]]
        )
    if hasattr(lm_head, "get_delta_weight"):  # a LoRA layer around the linear one
        weight, bias = head_parameters(lm_head.get_base_layer())
        adapters = [] if lm_head.disable_adapters or lm_head.merged else lm_head.active_adapters
        for adapter in (a for a in adapters if a in lm_head.lora_A):
            variant = getattr(lm_head, "lora_variant", {}).get(adapter)
            kind = type(variant).__name__
            require(variant is None, "peft_config", f"{kind} on the lm_head is not supported; plain LoRA is")
            weight = weight + lm_head.get_delta_weight(adapter).to(weight.dtype)
        return weight, bias
    require(
        isinstance(lm_head, nn.Linear) and lm_head.weight.is_floating_point(),
        "model",
        f"its lm_head must be a linear layer in floating point, got {type(lm_head).__name__}",
    )
    return lm_head.weight, lm_head.bias


# How configs call the dropout that modules keep as a number and pass to functions.
_DROPOUT_NUMBERS = ("attention_dropout", "dropout", "dropout_prob", "hidden_dropout", "resid_dropout")


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout rate to 0, so that training mode computes what evaluation mode does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUT_NUMBERS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
