"""The models of a run, out of what a user gives, each proven by probes to be one that the trainer trains rightly."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from ..call.checks import require
from . import loading, probe
from .actor_critic import ActorCritic, ValueFunction
from .config import KLQConfig
from .frozen import FrozenPolicy
from .models import LanguageModel
from .rollout import check_ids
from .sharding import gathered


class Parts(NamedTuple):
    """What is trained, and the reference where it is a model of its own."""

    actor_critic: ActorCritic
    reference: FrozenPolicy | None
    padding_free: bool  # whether sequences are concatenated


def proven_parts(
    args: KLQConfig,
    policy: nn.Module,
    critic: nn.Module | None,
    ref_model: nn.Module | None,
    *,
    tokenizer: Any,
    peft_config: Any,
    optimizer: torch.optim.Optimizer | None,
) -> Parts:
    """The models of a run. Models that ZeRO-3 sharded as they were loaded are whole meanwhile, as probes run them.

    Raises:
        ValueError: naming the argument of the trainer that does not fit, and what would.
    """
    given = [model for model in (policy, critic, ref_model) if model is not None]
    with gathered(p for model in given for p in model.parameters()):
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
        loading.warn_of_16_bit("value_model", critic)
        reference = _reference(args, language_model, ref_model)
        value = ValueFunction(language_model.config.hidden_size, critic)
        loading.check_optimizer(optimizer, value)
        actor_critic = ActorCritic(policy, value, args.temperature, args.shared_value_gradient)
        backbones = {"model": language_model.backbone}
        if value.backbone is not None:
            backbones["value_model"] = value.backbone
            embeddings: Any = value.backbone.get_input_embeddings()  # type: ignore[operator]
            loading.check_vocabulary("value_model", embeddings.num_embeddings, language_model.vocab_size)
        for name, backbone in backbones.items():
            probe.prove_padding(name, backbone, language_model)
        if args.disable_dropout:
            probe.silence(actor_critic, backbones, language_model)
        else:
            probe.check_head_dropout(language_model)
        if reference is not None:
            backbones["ref_model"] = reference.language_model.backbone
        return Parts(actor_critic, reference, _padding_free(args, backbones, language_model))


def _reference(args: KLQConfig, policy: LanguageModel, given: nn.Module | None) -> FrozenPolicy | None:
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
    reference = FrozenPolicy(model.to(args.torch_dtype("ref_dtype")), args.temperature)
    loading.check_vocabulary("ref_model", reference.language_model.vocab_size, policy.vocab_size)
    probe.prove_head(reference.language_model)
    return reference


def _padding_free(args: KLQConfig, backbones: dict[str, nn.Module], language_model: LanguageModel) -> bool:
    """Whether to concatenate sequences: where wanted, or with FlashAttention, if every backbone reads them so."""
    wanted = args.padding_free
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
