"""The module that is trained: a policy and its value function, called as one.

``forward`` takes an objective, a function of the states that matter, and calls it *inside* the module. So whatever
wraps the module (DDP's bookkeeping, FSDP2's gathering of sharded weights, autocast) is in force while the objective
reads the lm_head's weight, and nothing of size [tokens, vocab] ever leaves the function that works on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..call.checks import require
from .batches import Inputs
from .models import Head, LanguageModel, backbone_states


class States(NamedTuple):
    """The inputs of an objective: N trained tokens in S sequences, packed."""

    hidden: Tensor  # [N, H], the policy's state before each trained token
    head: Head
    values: Tensor  # fp32 [N], V of the state before each trained token
    last_values: Tensor  # fp32 [S], V of the state after the last token


Objective = Callable[[States], Any]


def held(states: States) -> States:
    """The objective that hands the states out, without gradients."""
    return states._replace(hidden=states.hidden.detach(), head=states.head.held())


class ValueFunction(nn.Module):
    """V of a state: a linear head, on the policy's hidden states or on those of a model of its own.

    Args:
        width: size of the hidden states that it reads, the policy's or the model's.
        model: None (the lean default: share the policy's backbone), a sequence-classification model with one label
            (a reward model, say: its head becomes the value head, in fp32), or a bare or causal-LM backbone.

    Raises:
        ValueError: where the model has a head that is neither one linear layer with one output nor an lm_head.
    """

    def __init__(self, width: int, model: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone: nn.Module | None = None
        head = None
        if model is not None:
            self.backbone = getattr(model, "base_model", model)
            head = trained_head(model, width)
        self.head = zero_head(width) if head is None else head.float()

    def forward(self, hidden: Tensor) -> Tensor:
        """V [N] in fp32 of hidden states [N, H] of the backbone this value function reads."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype)).float().squeeze(-1)


def trained_head(model: Any, width: int) -> nn.Linear | None:
    """The head [1, ``width``] that a model has on its backbone, whatever its name; None of a backbone or a causal LM.

    Raises:
        ValueError: where what it has there is something else, which a fresh head would replace unnoticed.
    """
    backbone = getattr(model, "base_model", model)
    if backbone is model or model.get_output_embeddings() is not None:
        return None
    inside = {id(p) for p in backbone.parameters()}
    outside = {name: p for name, p in model.named_parameters() if id(p) not in inside}
    owners = {name.rpartition(".")[0] for name in outside}
    if not owners:
        return None
    modules = [model.get_submodule(name) for name in owners]
    heads = [m for m in modules if isinstance(m, nn.Linear) and m.in_features == width]
    advice = "load it with num_labels=1, or give its backbone (AutoModel), on which a head that begins at 0 is trained"
    if len(heads) == len(modules) == 1:
        labels = heads[0].out_features
        require(labels == 1, "value_model", f"must have one label, got {labels}; {advice}")
        return heads[0]
    raise ValueError(
        f"value_model: {type(model).__name__} is not supported: its head ({', '.join(sorted(outside))}) is not one "
        f"linear layer [1, {width}] on the hidden states; {advice}"
    )


def scaled_gradient(hidden: Tensor, scale: float) -> Tensor:
    """``hidden`` itself, through which only ``scale`` of a gradient passes."""
    if scale == 1.0:
        return hidden
    return hidden.detach() if scale == 0.0 else torch.lerp(hidden.detach(), hidden, scale)


def zero_head(width: int) -> nn.Linear:
    """A fresh value head: fp32, and 0 everywhere, so that the first returns are the rewards themselves."""
    head = nn.Linear(width, 1, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class ActorCritic(nn.Module):
    """A policy (a causal LM, perhaps with adapters) and its value function, in one module."""

    accepts_loss_kwargs = True  # tells transformers.Trainer that losses come normalised over the whole step
    main_input_name = "input_ids"

    def __init__(
        self, policy: nn.Module, value: ValueFunction, temperature: float = 1.0, value_gradient: float = 1.0
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self.temperature = temperature
        self.value_gradient = value_gradient
        self.language_model = LanguageModel(policy)

    @property
    def config(self) -> Any:
        return self.policy.config

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of layers that sharding engines make groups of, as transformers names them on its models."""
        models = (self.policy, self.value.backbone)
        return sorted({name for model in models for name in getattr(model, "_no_split_modules", None) or ()})

    def forward(
        self, inputs: Inputs, objective: Objective, values_alone: bool = False, known_values: Tensor | None = None
    ) -> Any:
        """objective(states) of a batch; whatever it returns is returned. With ``values_alone`` no gradient of it enters
        the policy. ``known_values`` [N], those of a value function that does not change, spare its pass.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not values_alone):
            states = value_states = self.language_model.hidden_states(inputs)
            head = self.language_model.head(self.temperature)
        if values_alone:
            head = head.held()
        hidden = states.index_select(0, inputs.rows)
        if known_values is not None:
            return objective(States(hidden, head, known_values, known_values.new_zeros(len(inputs.last))))
        if self.value.backbone is None:
            value_hidden = scaled_gradient(hidden, self.value_gradient)
        else:
            value_states = backbone_states(self.value.backbone, inputs)
            value_hidden = value_states.index_select(0, inputs.rows)
        values = self.value(value_hidden)
        last_values = self.value(value_states.detach().index_select(0, inputs.last))  # bootstraps only: no gradient
        return objective(States(hidden, head, values, last_values))

    @torch.no_grad()
    def generate(self, **kwargs: Any) -> Tensor:
        return self.policy.generate(**kwargs)  # type: ignore[operator]

    # transformers renames this in version 5; each name goes on to the same one of the models inside

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        self._checkpoint("activation_checkpointing_enable", **kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self._checkpoint("gradient_checkpointing_enable", **kwargs)

    def _checkpoint(self, method: str, **kwargs: Any) -> None:
        for model in (self.policy, self.value.backbone):
            if model is not None:
                getattr(model, method)(**kwargs)
        if self.language_model.is_peft:  # frozen embeddings: without it no gradient would enter the checkpoints
            self.policy.enable_input_require_grads()  # type: ignore[operator]
