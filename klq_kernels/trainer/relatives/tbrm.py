"""TBRM, trajectory Bellman residual minimisation (arXiv 2505.15311): the policy's own logits are the action values.

With Q(s, a) = beta logit(s, a) the soft value is V(s) = beta logsumexp(s), the policy softmax(logits) is the optimal
one for that Q, and the soft Bellman residual of a token is Q_t - V_{t+1} - r_t - beta log pi_ref_t. Summed over a
sequence all values but the first cancel, and with R the score of the whole, in units of beta,

    e = logit(a_1|s_1) + sum_{t >= 2} log pi_t - sum_t log pi_ref_t - R / beta.

The loss is e^2, one for each sequence, whoever sampled it: no critic, no ratio, no clip. logit(a_1|s_1) is log pi_1
plus the log-normaliser, both of which ``linear_logprobs`` gives, and differentiates.

In the terms of the cycle (beta is ``tau``): its value function stays 0, so the lambda-error of the first token, with
lambda = 1, is A_1 = R - tau sum_t (old_logp_t - ref_logp_t), and

    e = logsumexp(s_1) + sum_t (logp_t - old_logp_t) - A_1 / tau.

``reference.tbrm_loss`` states it. In a model that was trained by likelihood the normaliser of the logits means nothing;
here it is V of the prompt in units of beta, and where it is far from that, the first updates go into it. The loss is of
the order (R / beta)^2, so that clipped gradients (``max_grad_norm``) are the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...returns import reverse_scan
from ..actor_critic import States
from ..batches import Inputs
from ..config import KLQConfig
from ..experience import Experience
from ..objectives import logprobs
from ..options import option
from ..trainer import KLQTrainer


@dataclass
class TBRMConfig(KLQConfig):
    """Arguments of ``TBRMTrainer``; tau is the paper's beta. Targets are whole returns, so gamma and lam stay 1.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    algorithms: ClassVar[tuple[str, ...]] = ("tbrm",)
    has_critic: ClassVar[bool] = False
    fixed: ClassVar[dict[str, Any]] = {
        "gamma": 1.0, "lam": 1.0, "lam_final": None, "value_lam": None, "group_baseline": False, "off_policy": "none",
        "bootstrap_truncated": False, "freeze_value_model": False,
    }  # fmt: skip

    algorithm: str = option("tbrm", "'tbrm'.")
    lam: float = option(1.0, "Must stay 1.")
    group_baseline: bool = option(False, "Must stay False.")
    bootstrap_truncated: bool = option(False, "Must stay False: there is no value function.")

    @property
    def ignored(self) -> tuple[str, ...]:
        return (
            "alpha", "loss_type", "huber_delta", "value_clip", "log_ratio_clip", "advantage_spread", "cliprange",
            "whiten_advantages", "importance_clip", "dppo_divergence", "dppo_delta",
        )  # fmt: skip


def tbrm(
    states: States,
    inputs: Inputs,
    experience: Experience,
    denom: Tensor,
    config: KLQConfig,
    seed: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The squared residuals of the sequences of a micro-batch that have a token, divided by ``denom``."""
    old_logprobs, old_values, errors = experience.targets
    policy = logprobs(states, inputs, config, seed=seed)
    change = policy.logprobs - old_logprobs
    first = inputs.cu_seqlens[:-1][inputs.cu_seqlens.diff() > 0].long()
    moved = reverse_scan(change, 1.0, cu_seqlens=inputs.cu_seqlens)[first]
    residuals = policy.logsumexp[first] + moved - (errors + old_values)[first] / config.tau
    losses, held = residuals.square(), change.detach()
    metrics = {
        "policy_loss": losses.detach().mean(),
        "residual_rms": losses.detach().mean().sqrt(),
        "kl_old_k3": (held.expm1() - held).mean(),
    }
    return losses.sum() / denom, metrics


class TBRMTrainer(KLQTrainer):
    """Trains a causal language model by TBRM; arguments as in ``KLQTrainer`` but value_model, with a ``TBRMConfig``."""

    config_class = TBRMConfig
    args: TBRMConfig

    def objective_of(self, batch: Inputs) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        return tbrm

    def step_weights(self, rows: Tensor) -> Tensor:
        return (rows > 0).long()
