"""OREO, offline reasoning optimisation (arXiv 2412.16145): the soft Bellman equation, summed to a sequence's end.

For the optimal policy of reward less beta KL, and its value function V, every sequence satisfies from every t on

    V_t = R - beta sum_{i >= t} (log pi_i - log pi_ref_i),

whoever sampled it. The critic learns V from the squared difference, with the policy held. The actor learns from the
same difference with V held, and of the sum its own token alone: what comes later is a constant, so that each token
answers for itself. A price on the exact KL(pi || pi_ref) over the vocabulary keeps tokens that no sample has seen.

In the terms of the cycle (beta is ``tau``): a KLQ rollout with lambda = 1 keeps A_t = R - tau sum_{i >= t}
(old_logp_i - ref_logp_i) - old_V_t, so both differences are

    e_t = tau sum_{i >= t} (logp_i - old_logp_i) + V_t - old_V_t - A_t.

KLQ's residual at lambda = 1 is this with the first term of the sum alone. They agree until the policy moves; after that
OREO's critic follows the whole sequence to the policy as it is.

``reference.oreo_loss`` states it. The paper trains on a set of samples that somebody collected; here they are those of
the cycle, over ``num_update_epochs``, or those that a ``rollout_func`` brings, whatever their policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ...call.checks import require_number
from ...returns import reverse_scan
from ..actor_critic import States
from ..batches import Inputs
from ..config import KLQConfig
from ..experience import Experience
from ..objectives import logprobs
from ..options import option
from ..trainer import KLQTrainer
from .divergence import check_whole, divergence


@dataclass
class OREOConfig(KLQConfig):
    """Arguments of ``OREOTrainer``; tau is the paper's beta, and the defaults are its.

    Targets are whole returns, so gamma and lam stay 1.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    algorithms: ClassVar[tuple[str, ...]] = ("oreo",)
    fixed: ClassVar[dict[str, Any]] = {
        "gamma": 1.0, "lam": 1.0, "lam_final": None, "value_lam": None, "group_baseline": False, "off_policy": "none",
    }  # fmt: skip

    algorithm: str = option("oreo", "'oreo'.")
    learning_rate: float = option(5e-6, "Initial learning rate.")
    tau: float = option(0.03, "The paper's beta: price of one nat of KL to the reference, in units of reward. > 0.")
    lam: float = option(1.0, "Must stay 1.")
    group_baseline: bool = option(False, "Must stay False.")
    kl_coef: float = option(0.01, "Weight of each token's exact KL(pi || pi_ref); 0 spares a pass of the reference.")

    @property
    def ignored(self) -> tuple[str, ...]:
        return (
            "alpha", "loss_type", "huber_delta", "value_clip", "log_ratio_clip", "advantage_spread", "cliprange",
            "vf_coef", "whiten_advantages", "importance_clip", "dppo_divergence", "dppo_delta",
        )  # fmt: skip

    def _check(self) -> None:
        super()._check()
        require_number("kl_coef", self.kl_coef, low=0.0)


def oreo(
    states: States,
    inputs: Inputs,
    experience: Experience,
    denom: Tensor,
    config: OREOConfig,
    seed: int | None = None,
    *,
    reference: States | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """OREO's losses over the tokens of a micro-batch, divided by ``denom``; ``reference`` where KL has a price."""
    old_logprobs, old_values, errors = experience.targets
    change = logprobs(states, inputs, config, seed=seed).logprobs - old_logprobs
    held = change.detach()
    sums = reverse_scan(held, 1.0, cu_seqlens=inputs.cu_seqlens)
    constant = -old_values - errors
    critic = (config.tau * sums + states.values + constant).square()
    actor = (config.tau * (change + (sums - held)) + states.values.detach() + constant).square()
    total = actor + critic
    metrics = {
        "policy_loss": actor.detach().mean(),
        "value_loss": critic.detach().mean(),
        "residual_rms": critic.detach().mean().sqrt(),
        "kl_old_k3": (held.expm1() - held).mean(),
        "value_mean": states.values.detach().mean(),
    }
    if reference is not None:
        kl = divergence(states, reference, inputs, config, "forward")
        total = total + config.kl_coef * kl
        metrics["kl_ref"] = kl.detach().mean()
    return total.sum() / denom, metrics


class OREOTrainer(KLQTrainer):
    """Trains a causal language model by OREO; arguments as in ``KLQTrainer``, with an ``OREOConfig``."""

    config_class = OREOConfig
    args: OREOConfig

    def _check_launch(self) -> None:
        super()._check_launch()
        if self.args.kl_coef > 0:
            check_whole(self.accelerator, "kl_coef", "set it to 0")

    def objective_of(self, batch: Inputs) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        reference = self.reference_states(batch) if self.args.kl_coef > 0 else None
        return partial(oreo, reference=reference)
