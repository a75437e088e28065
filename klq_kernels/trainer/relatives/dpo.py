"""DPO and TDPO: the policy learns from pairs of completions, without samples, rewards or a value function.

With lr = log pi / pi_ref, every policy is the optimum of some reward less beta KL, and of that reward a completion's
sum beta sum_t lr_t is what distinguishes it from another of the same prompt. DPO (arXiv 2305.18290) makes the preferred
completion's sum the larger one:

    -log sigmoid(beta (sum_chosen lr - sum_rejected lr))

TDPO (arXiv 2404.11999) adds the divergence KL(pi_ref || pi) that has gathered along either completion, exact over the
whole vocabulary at every token, and so holds the policy near the reference where DPO looks at the taken tokens alone.

``reference.dpo_loss`` and ``reference.tdpo_loss`` state both. Here is the loss of a batch of pairs from hidden states;
``dpo_trainer`` has the run. Log-probabilities come from ``linear_logprobs``, divergences from ``linear_kl``: nothing of
size [tokens, vocab] is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...logprobs import linear_logprobs
from ..actor_critic import States
from ..batches import Inputs
from .divergence import divergence
from .dpo_config import DPOConfig


class Referred(NamedTuple):
    """What the reference says of a batch of N trained tokens."""

    logprobs: Tensor  # fp32 [N]
    states: States | None  # TDPO: its hidden states and its head


def token_logprobs(states: States, inputs: Inputs, config: DPOConfig) -> Tensor:
    """Log-probabilities of the trained tokens, fp32 [N]."""
    return linear_logprobs(
        states.hidden, **states.head._asdict(), actions=inputs.actions, cu_seqlens=inputs.cu_seqlens,
        logits_dtype=config.logits_dtype, workspace_bytes=config.workspace_bytes,
    ).logprobs  # fmt: skip


def pair_losses(
    states: States, inputs: Inputs, referred: Referred, config: DPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the loss of each of P pairs, fp32 [P]; its parts, [P] each, without gradients).

    Args:
        states: of the policy, at the trained tokens of 2 P sequences: the P preferred ones, then the others.
        inputs: those sequences.
        referred: what the reference says of them.
        config: of the run.
    """
    logp = token_logprobs(states, inputs, config)
    chosen, rejected = _sums(logp - referred.logprobs, inputs).chunk(2)
    margin = config.beta * (chosen - rejected)
    parts = {"rewards/chosen": config.beta * chosen, "rewards/rejected": config.beta * rejected}
    parts |= {"rewards/margins": margin, "rewards/accuracies": (chosen > rejected).float()}
    parts |= dict(zip(("logps/chosen", "logps/rejected"), _sums(logp, inputs).chunk(2), strict=True))
    if referred.states is not None:
        kl = divergence(states, referred.states, inputs, config, "reverse")
        chosen_kl, rejected_kl = _sums(kl, inputs).chunk(2)
        parts |= {"kl/chosen": chosen_kl, "kl/rejected": rejected_kl}
        weight = config.beta if config.loss == "tdpo1" else config.alpha * config.beta
        held_kl = chosen_kl if config.loss == "tdpo1" else chosen_kl.detach()
        margin = margin - weight * (rejected_kl - held_kl)
    return -logsigmoid(margin), {name: part.detach() for name, part in parts.items()}


def _sums(tokens: Tensor, inputs: Inputs) -> Tensor:
    """The sum of each sequence, [S], of packed per-token numbers [N]."""
    return torch.segment_reduce(tokens, "sum", lengths=inputs.cu_seqlens.diff().long(), unsafe=True)
