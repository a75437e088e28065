"""KLQ for hosts that hand a policy loss its advantages: actor and critic are trained apart there.

The loss is ``klq_loss`` with the value held at the rollout's, so its residual is tau (logp - old_logp) - alpha A. The
critic is trained by the host, to the returns that the host's estimator gives (``returns.gae`` plus the old values).

A is KLQ's where the host's rewards already carry -tau (old_logp - ref_logp): the unwhitened GAE on them is the
lambda-error. ``require_klq_rewards`` holds a host's settings to that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..call.checks import require
from ..loss import check_loss, klq_loss
from ..types import KLQLoss, KLQTargets


@dataclass(frozen=True)
class Objective:
    """The settings of ``klq_loss`` that a host's config has no place for; ``loss`` calls it.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    tau: float = 0.05
    alpha: float = 1.0
    loss_type: str = "l2"
    huber_delta: float = 1.0
    value_clip: float = 0.2
    log_ratio_clip: float = 0.2

    def __post_init__(self) -> None:
        check_loss(**asdict(self))

    def loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        weights: Tensor | None = None,
        denom: Tensor | float | None = None,
        ref_logprobs: Tensor | None = None,
    ) -> KLQLoss:
        """``klq_loss`` on tensors [B, T], the value held at the rollout's."""
        zero = torch.zeros_like(logprobs.detach())
        return klq_loss(
            logprobs, zero, KLQTargets(old_logprobs, zero, advantages), mask=mask.bool(), weights=weights,
            denom=denom, ref_logprobs=ref_logprobs, **asdict(self),
        )  # fmt: skip


def weights_of(aggregate: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The weight of each token in a host's aggregate of per-token losses, which is linear: its derivative."""
    with torch.enable_grad():
        losses = torch.ones_like(like, dtype=torch.float32, requires_grad=True)
        (weights,) = torch.autograd.grad(aggregate(losses), losses)
    return weights


def require_klq_rewards(name: str, *, on: bool, estimator: str, fixed: bool, coefficient: float, tau: float) -> None:
    """Raises a ValueError unless a host takes tau times the log-ratio off its rewards.

    Args:
        name: of the host's settings.
        on: whether it takes a KL penalty off its rewards at all.
        estimator: its name of the penalty.
        fixed: whether the coefficient stays as it is.
        coefficient: of the penalty.
        tau: of the loss.
    """
    require(on, name, "KLQ needs the KL penalty in the rewards; set use_kl_in_reward=True and use_kl_loss=False")
    require(estimator in ("kl", "k1"), name, f"KLQ's penalty is the log-ratio, named k1; got {estimator!r}")
    require(fixed, name, "KLQ's penalty has a fixed coefficient; set kl_ctrl.type=fixed")
    require(
        abs(coefficient - tau) <= 1e-6 * tau,
        name,
        f"the coefficient of the KL penalty must be tau, {tau}; got {coefficient}",
    )


def numbers(found: KLQLoss, prefix: str) -> dict[str, float]:
    """The metrics as hosts log them."""
    return {f"{prefix}{name}": value.item() for name, value in found.metrics.items()}
