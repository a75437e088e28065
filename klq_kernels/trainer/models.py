"""The facts about a causal language model that the trainer needs: where its hidden states end and its lm_head begins.

The logits of a supported model are  z = softcap((hidden @ weight.T + bias) * scale), with every part but the weight
optional: softcap (Gemma), scale (Cohere, Granite), a weight tied to the embeddings, LoRA on the head (its update is
added to the weight). ``LanguageModel`` finds these parts, and ``probe`` proves on a few tokens that they give the
model's own log-probabilities, so that a model with another kind of head is refused instead of being trained wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..call.checks import require
from .batches import Inputs
from .export import trained_copy, whole_weights


class Head(NamedTuple):
    """An lm_head as arguments of ``linear_logprobs`` and ``fused_klq_loss``; the weight is [V, H], the bias [V]."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    temperature: float

    def held(self) -> Head:
        """The head without gradients."""
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


class LanguageModel:
    """The parts of a causal language model, or of a PEFT model around one. Holds no parameters of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.is_peft = hasattr(model, "get_base_model") and hasattr(model, "disable_adapter")
        causal_lm: Any = model.get_base_model() if self.is_peft else model  # type: ignore[operator]
        self._causal_lm = causal_lm
        name = type(causal_lm).__name__
        require(isinstance(causal_lm, PreTrainedModel), "model", f"must be a transformers causal LM, got {name}")
        self.lm_head = causal_lm.get_output_embeddings()
        require(self.lm_head is not None, "model", f"{name} has no lm_head (get_output_embeddings() is None)")
        weight = self.lm_head.weight
        # rows of the lm_head: ids from 0 up to it exist. ZeRO-3 leaves a weight without elements, and notes its shape
        self.vocab_size = int(getattr(weight, "ds_shape", weight.shape)[0])
        self.backbone = causal_lm.base_model
        require(self.backbone is not causal_lm, "model", f"{name} does not separate its backbone from its lm_head")
        self.config = causal_lm.config.get_text_config()
        require(not self.config.is_encoder_decoder, "model", f"{name} is an encoder-decoder; a causal LM is needed")
        require(
            not getattr(self.config, "output_router_logits", False),
            "model",
            "its config asks for router logits, whose auxiliary loss the trainer does not add; set "
            "model.config.output_router_logits = False",
        )
        for adapter, settings in getattr(model, "peft_config", {}).items() if self.is_peft else ():
            prompts = getattr(settings, "is_prompt_learning", False)
            require(
                not prompts,
                "peft_config",
                f"adapter {adapter!r} learns a prompt; only adapters of weights are supported",
            )
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
        weight, bias = head_parameters(self.lm_head)
        return Head(weight, bias, self._softcap, temperature / self._scale)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of the model by its base's names, whole and merged (``export.whole_weights``)."""
        return whole_weights(self._causal_lm)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Inside, a PEFT model is its base model: the reference policy. What is trained afterwards is what was before.

        PEFT has every weight of the active adapters require a gradient as it switches them on again, frozen ones too.
        """
        if not self.is_peft:
            yield
            return
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield
        finally:
            for parameter, trained in before:
                if parameter.requires_grad != trained:
                    parameter.requires_grad_(trained)


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
        return head_parameters(trained_copy(lm_head))
    if hasattr(lm_head, "get_base_layer"):  # an adapter around the linear layer
        weight, bias = head_parameters(lm_head.get_base_layer())
        for adapter in [] if lm_head.disable_adapters or lm_head.merged else lm_head.active_adapters:
            if _has_adapter(lm_head, adapter):
                weight, bias = _with_adapter(lm_head, adapter, weight, bias)
        return weight, bias
    require(
        isinstance(lm_head, nn.Linear) and lm_head.weight.is_floating_point(),
        "model",
        f"its lm_head must be a linear layer in floating point, got {type(lm_head).__name__}",
    )
    return lm_head.weight, lm_head.bias


def _has_adapter(layer: Any, adapter: str) -> bool:
    """Whether a PEFT layer has weights of this adapter: it may lie on other layers alone."""
    parts = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    return any(adapter in part for part in parts if part is not None)


def _with_adapter(layer: Any, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) with the sum that an adapter adds; ``probe.prove_adapters`` finds adapters that do more."""
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    kind = type(layer if variant is None else variant).__name__
    plain = variant is None and hasattr(layer, "get_delta_weight")
    require(plain, "peft_config", f"{kind} on the lm_head is not supported; plain LoRA is")
    delta = layer.get_delta_weight(adapter)
    require(
        delta.shape == weight.shape, "peft_config", f"{kind} on the lm_head does more than add; plain LoRA is supported"
    )
    weight = weight + delta.to(weight.dtype)
    down = getattr(layer, "lora_B", {})
    extra = getattr(down[adapter], "bias", None) if adapter in down else None
    if extra is not None:
        extra = (layer.scaling[adapter] * extra).to(weight.dtype)
        bias = extra if bias is None else bias + extra
    return weight, bias
