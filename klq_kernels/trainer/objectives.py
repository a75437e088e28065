"""Functions of the states of a batch: the scores of a rollout, the KLQ loss, the PPO loss.

Each is a function of ``States`` (see ``actor_critic``). Both algorithms share everything up to the loss: the
unwhitened GAE on rewards r_t - tau (log pi - log pi_ref), which PPO-penalty uses, *is* KLQ's lambda-error, so both take
their targets from ``klq_targets``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..logprobs import linear_logprobs
from ..loss import fused_klq_loss, klq_loss
from ..types import LinearLogprobs
from .actor_critic import States
from .batches import Inputs
from .config import KLQConfig
from .experience import Experience
from .off_policy import importance_trace, trusted


class Scored(NamedTuple):
    """Of a batch of rollouts, packed: fp32 [N], last_values [S]."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    last_values: Tensor


def _head(states: States, inputs: Inputs, config: KLQConfig, seed: int | None) -> dict[str, Any]:
    """The arguments that ``linear_logprobs`` and ``fused_klq_loss`` share: head, tokens and kind of gradient."""
    return {
        **states.head._asdict(),
        "actions": inputs.actions,
        "cu_seqlens": inputs.cu_seqlens,
        "logits_dtype": config.logits_dtype,
        "gradient": config.head_gradient,
        "samples": config.head_samples,
        "seed": seed,
        "workspace_bytes": config.workspace_bytes,
    }


def logprobs(
    states: States, inputs: Inputs, config: KLQConfig, *, entropy: bool = False, seed: int | None = None
) -> LinearLogprobs:
    """Log-probabilities of the sampled tokens under any policy, and its entropy where asked for.

    ``seed`` is that of a sampled gradient.
    """
    return linear_logprobs(states.hidden, **_head(states, inputs, config, seed), return_entropy=entropy)


def score(states: States, inputs: Inputs, config: KLQConfig) -> Scored:
    """Log-probabilities, entropy and values of a rollout. For ``no_grad``."""
    policy = logprobs(states, inputs, config, entropy=True)
    assert policy.entropy is not None
    return Scored(policy.logprobs, policy.entropy, states.values, states.last_values)


def klq(
    states: States,
    inputs: Inputs,
    experience: Experience,
    denom: Tensor,
    config: KLQConfig,
    seed: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The KLQ loss (arXiv 2508.17000, eq. 6) over the tokens of a micro-batch, divided by ``denom``.

    Where policy and V have errors of their own it is ``reference.split_residual_loss``, from log-probabilities.
    ``seed`` is that of a sampled gradient.
    """
    settings: dict[str, Any] = {
        "ref_logprobs": experience.ref_logprobs, "tau": config.tau, "alpha": config.alpha * experience.step,
        "loss_type": config.loss_type, "huber_delta": config.huber_delta, "value_clip": config.value_clip,
        "log_ratio_clip": config.log_ratio_clip, "denom": denom,
    }  # fmt: skip
    head = _head(states, inputs, config, seed)
    if not config.errors_differ:
        return fused_klq_loss(states.hidden, **head, values=states.values, targets=experience.targets, **settings)
    logp, values = logprobs(states, inputs, config, seed=seed).logprobs, states.values
    settings["cu_seqlens"] = inputs.cu_seqlens
    own = experience.targets._replace(advantages=experience.advantages)
    loss, metrics = klq_loss(logp, values.detach(), own, **settings)
    value_loss, _ = klq_loss(logp.detach(), values, experience.targets, **settings)
    return loss + value_loss - value_loss.detach(), metrics


def ppo(
    states: States,
    inputs: Inputs,
    experience: Experience,
    denom: Tensor,
    config: KLQConfig,
    seed: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss (arXiv 1707.06347, eq. 7) with a clipped value loss, divided by ``denom``.

    The KL penalty is in the rewards, so in the advantages already (PPO-penalty as in arXiv 1909.08593). Where samples
    are corrected for (``off_policy``) DPPO's loss takes the place of the clipped one, and the value targets are those
    of V-trace. ``seed`` is that of a sampled gradient.
    """
    old_logprobs, old_values, errors = experience.targets
    logp = logprobs(states, inputs, config, seed=seed).logprobs
    change = logp - old_logprobs
    sampler = experience.sampler_logprobs
    if sampler is None:
        policy, bounded = clipped_policy_loss(change.exp(), experience.advantages, config)
    else:
        policy, bounded = masked_policy_loss(logp, sampler, experience.advantages, config)
        errors = errors * importance_trace(old_logprobs, sampler, config.trace_clip)
    returns = errors + old_values
    near = old_values + (states.values - old_values).clamp(-config.value_clip, config.value_clip)
    value = 0.5 * torch.maximum((states.values - returns).square(), (near - returns).square())
    loss = (policy + config.vf_coef * value if config.learns_values else policy).sum() / denom
    with torch.no_grad():
        metrics = {
            "policy_loss": policy.mean(),
            "value_loss": value.mean(),
            "ratio": change.exp().mean(),
            "kl_old_k3": (change.expm1() - change).mean(),
            "policy_clip_fraction": bounded.float().mean(),
            "value_clip_fraction": (states.values != near).float().mean(),
            "value_mean": states.values.mean(),
        }
    return loss, metrics


def clipped_policy_loss(ratio: Tensor, advantages: Tensor, config: KLQConfig) -> tuple[Tensor, Tensor]:
    """(PPO's clipped loss [N], where the ratio is clipped, bool [N])."""
    clipped = ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio != clipped


def masked_policy_loss(
    logp: Tensor, sampler_logprobs: Tensor, advantages: Tensor, config: KLQConfig
) -> tuple[Tensor, Tensor]:
    """(DPPO's loss [N], where its mask takes a token out, bool [N])."""
    now = logp.detach()
    weight = importance_trace(now, sampler_logprobs, config.importance_clip)
    kept = trusted(now, sampler_logprobs, advantages, config.dppo_divergence, config.mask_delta)
    return torch.where(kept, -advantages * weight * logp, 0.0), ~kept


OBJECTIVES = {"klq": klq, "ppo": ppo}
