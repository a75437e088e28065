"""What a step of training wants to know of its batch, from the per-row vectors the pass leaves behind.

Means are true means over the valid tokens, whatever ``denom`` and ``weights`` the loss was given. rho is the log-ratio
against the reference, d the one against the old policy; tokens are taken as sampled from the policy (kl_ref) or from
the old policy (kl_old). k1 and k3 are the usual one-sample estimators: k1 unbiased, k3 unbiased and never negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import LossShape, Terms


def metric_names(*, on_policy: bool, reference: bool, loss_type: str, entropy: bool) -> list[str]:
    """The keys of ``KLQLoss.metrics``, in the order in which ``klq_metrics`` computes them."""
    names = ["loss", "value_mean", "advantage_mean", "residual_rms", "explained_variance"]
    if on_policy:
        names += ["td_error_rms"]
    else:
        names += ["kl_old_k1", "kl_old_k3"]
    if reference:
        names += ["q_mean", "log_ratio_mean", "kl_ref_k1", "kl_ref_k3"]
    if loss_type in ("value_clipped", "double_clipped"):
        names += ["value_clip_fraction"]
    if loss_type in ("ratio_clipped", "double_clipped"):
        names += ["log_ratio_clip_fraction"]
    if entropy:
        names += ["entropy"]
    return names


def klq_metrics(
    loss: Tensor,
    terms: Terms,
    shape: LossShape,
    *,
    ref_logp: Tensor | None,
    entropy: Tensor | None = None,
    decay_next: Tensor | None = None,
) -> Tensor:
    """fp32 [K], one number per name in ``metric_names``; all zero where there is no valid row.

    residual_rms is the root mean square of Q_t - G_t; td_error_rms that of the one-step delta_t; explained_variance is
    1 - Var(R - V) / Var(R) with R = A + V the lambda-return at the old policy.

    Args:
        loss: fp32, 0-d.
        ref_logp, entropy: fp32 [n], or None where the call has no such thing.
        decay_next: fp32 [n], gamma lambda c_{t+1}, 0 at sequence ends; on-policy only.
    """
    names = metric_names(
        on_policy=terms.old_logp is None,
        reference=ref_logp is not None,
        loss_type=shape.loss_type,
        entropy=entropy is not None,
    )
    n = terms.logp.numel()
    if n == 0:
        return loss.new_zeros(len(names))
    old_values = terms.values if terms.old_values is None else terms.old_values
    d = torch.zeros_like(terms.logp) if terms.old_logp is None else terms.logp - terms.old_logp
    change = shape.tau * d + (terms.values - old_values)
    returns = terms.advantages + old_values
    spread = returns.var(correction=0)
    unexplained = (returns - terms.values).var(correction=0)
    out = {
        "loss": loss,
        "value_mean": terms.values.mean(),
        "advantage_mean": terms.advantages.mean(),
        "residual_rms": (change - shape.alpha * terms.advantages).square().mean().sqrt(),
        "explained_variance": torch.where(spread == 0, 0.0, 1 - unexplained / spread),
    }
    if decay_next is not None:
        following = torch.where(decay_next == 0, 0.0, decay_next * terms.advantages.roll(-1))
        out["td_error_rms"] = (terms.advantages - following).square().mean().sqrt()
    if terms.old_logp is not None:
        out["kl_old_k1"] = -d.mean()
        out["kl_old_k3"] = (torch.expm1(d) - d).mean()
    if ref_logp is not None:
        rho = terms.logp - ref_logp
        out["q_mean"] = (shape.tau * rho + terms.values).mean()
        out["log_ratio_mean"] = out["kl_ref_k1"] = rho.mean()
        out["kl_ref_k3"] = (torch.expm1(-rho) + rho).mean()
    if "value_clip_fraction" in names:
        out["value_clip_fraction"] = (change.abs() > shape.value_clip).float().mean()
    if "log_ratio_clip_fraction" in names:
        out["log_ratio_clip_fraction"] = (d.abs() > shape.log_ratio_clip).float().mean()
    if entropy is not None:
        out["entropy"] = entropy.mean()
    return torch.stack([out[name] for name in names])
