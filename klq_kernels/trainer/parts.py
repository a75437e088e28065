"""The models of a run, out of what a user gives, each proven by probes to be one that the trainer trains rightly."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig

from ..call.checks import require
from ..guidance.guide import width_of
from . import loading, probe
from .actor_critic import ActorCritic, ValueFunction, trained_head
from .config import KLQConfig
from .frozen import FrozenPolicy
from .models import LanguageModel
from .rollout import check_ids
from .sharding import gathered


class Reading(NamedTuple):
    """How the backbones of a run read tokens."""

    padding_free: bool  # sequences are concatenated
    positions: int | None  # so many tokens at most: they have learned no further positions


class Parts(NamedTuple):
    """The policy and its value function in one module, the reference where it is a model of its own, and the layout."""

    actor_critic: ActorCritic
    reference: FrozenPolicy | None
    reading: Reading


def proven_parts(
    args: KLQConfig,
    policy: nn.Module,
    critic: nn.Module | None,
    ref_model: nn.Module | None,
    *,
    tokenizer: Any,
    peft_config: Any,
    optimizer: torch.optim.Optimizer | None,
    generation_config: GenerationConfig | None = None,
) -> Parts:
    """The models of a run. Models that ZeRO-3 sharded as they were loaded are whole meanwhile, as probes run them.

    ``generation_config``: how the policy's own ``generate`` samples; None where an engine or a rollout function does.

    Raises:
        ValueError: naming the argument of the trainer that does not fit, and what would.
    """
    given = [model for model in (policy, critic, ref_model) if model is not None]
    with gathered(p for model in given for p in model.parameters()):
        policies = proven_policies(
            policy, ref_model, tokenizer=tokenizer, peft_config=peft_config, temperature=args.temperature,
            ref_dtype=args.torch_ref_dtype,
        )  # fmt: skip
        language_model = policies.language_model
        read: Any = language_model.backbone if critic is None else getattr(critic, "base_model", critic)
        value = ValueFunction(width_of(read), critic)
        if not args.learns_values:
            value.requires_grad_(False)
        loading.warn_of_16_bit("value_model", value.backbone)
        loading.check_optimizer(optimizer, value)
        actor_critic = ActorCritic(language_model.model, value, args.temperature, args.shared_value_gradient)
        backbones = {"model": language_model.backbone}
        if value.backbone is not None:
            backbones["value_model"] = value.backbone
            embeddings: Any = value.backbone.get_input_embeddings()  # type: ignore[operator]
            loading.check_vocabulary("value_model", embeddings.num_embeddings, language_model.vocab_size)
            if trained_head(critic, value.head.in_features) is not None:
                probe.prove_value_head(critic, value, language_model)
        reading = prove_backbones(
            actor_critic, backbones, policies, disable_dropout=args.disable_dropout, padding_free=args.padding_free
        )
        if generation_config is not None:
            probe.prove_sampling(language_model)
            if args.generation_kwargs:
                probe.prove_settings(language_model, generation_config)
        return Parts(actor_critic, policies.reference, reading)


class Policies(NamedTuple):
    """The policy alone, adapters included, and the reference where it is a model of its own."""

    language_model: LanguageModel
    reference: FrozenPolicy | None


def proven_policies(
    policy: nn.Module,
    ref_model: nn.Module | None,
    *,
    tokenizer: Any,
    peft_config: Any,
    temperature: float,
    ref_dtype: torch.dtype | None,
) -> Policies:
    """A policy, with adapters where they are asked for, and its reference; raises as ``proven_parts`` does."""
    language_model = LanguageModel(policy)
    probe.prove_head(language_model)
    check_ids("processing_class: pad_token_id", [tokenizer.pad_token_id], language_model.vocab_size)
    before = None
    if peft_config is not None:
        before = probe.logits_of(language_model) if ref_model is None else None
        policy = loading.with_adapters(policy, peft_config)
        language_model = LanguageModel(policy)
    elif ref_model is None:
        probe.check_initialisation(policy)
    probe.prove_adapters(language_model, before)
    loading.check_trainable(policy, language_model.is_peft)
    loading.warn_of_16_bit("model", policy)
    return Policies(language_model, _reference(language_model, ref_model, temperature, ref_dtype))


def prove_backbones(
    trained: nn.Module,
    backbones: dict[str, nn.Module],
    policies: Policies,
    *,
    disable_dropout: bool,
    padding_free: bool | None,
) -> Reading:
    """Probes what reads tokens: padding, causality, dropout, positions.

    Args:
        trained: all that is trained.
        backbones: its backbones, by the argument that brought them.
        policies: the policy, and the reference, whose backbone is probed as well.
        disable_dropout, padding_free: arguments of the run.
    """
    language_model, reference = policies
    for name, backbone in backbones.items():
        probe.prove_padding(name, backbone, language_model)
        probe.prove_causal(name, backbone, language_model)
    if disable_dropout:
        probe.silence(trained, backbones, language_model)
    else:
        probe.check_head_dropout(language_model)
    if reference is not None:
        backbones = {**backbones, "ref_model": reference.language_model.backbone}
    positions = probe.shared_positions(backbones.values(), language_model)
    return Reading(_padding_free(padding_free, backbones, language_model), positions)


def _reference(
    policy: LanguageModel, given: nn.Module | None, temperature: float, dtype: torch.dtype | None
) -> FrozenPolicy | None:
    """The given reference or a copy of the policy; None where the policy without its adapters is the reference."""
    if given is None and policy.is_peft:
        return None
    if given is not None:
        require(
            not loading.shares_parameters(policy.model, given, trained=True),
            "ref_model",
            "must not share trained parameters with model; leave it None: the policy as it is now is the reference",
        )
    model = copy.deepcopy(policy.model) if given is None else given
    reference = FrozenPolicy(model if dtype is None else model.to(dtype), temperature)
    loading.check_vocabulary("ref_model", reference.language_model.vocab_size, policy.vocab_size)
    probe.prove_head(reference.language_model)
    return reference


def _padding_free(wanted: bool | None, backbones: dict[str, nn.Module], language_model: LanguageModel) -> bool:
    """Whether to concatenate sequences: where wanted, or with FlashAttention, if every backbone reads them so."""
    if wanted is None:
        wanted = "flash" in str(getattr(language_model.config, "_attn_implementation", ""))
    failing = [n for n, b in backbones.items() if wanted and not probe.keeps_sequences_apart(b, language_model)]
    if failing:
        warnings.warn(
            f"padding_free: {', '.join(failing)} mixes sequences that are concatenated (a probe shows it), so they "
            "are padded",
            stacklevel=4,
        )
    return wanted and not failing
