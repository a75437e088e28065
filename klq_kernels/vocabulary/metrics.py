"""The names and definitions of the metrics of a call.

Means are true means over the valid tokens, whatever ``denom`` and ``weights`` the loss was given. rho is the log-ratio
against the reference, d the one against the old policy; tokens are taken as sampled from the policy (kl_ref) or from
the old policy (kl_old). k1 and k3 are the usual one-sample estimators: k1 unbiased, k3 unbiased and never negative.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from .chunks import LossShape, Terms


def metric_names(
    *, on_policy: bool, reference: bool, loss_type: str, entropy: bool, sampled: bool = False
) -> list[str]:
    """The keys of ``KLQLoss.metrics`` for such a call, in the order in which ``portable.klq_metrics`` gives them, and
    last that of a ``sampled`` gradient: the mean number of entries that it keeps of a token's.
    """
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
    if sampled:
        names += ["gradient_entries"]
    return names


def klq_metrics(
    backend: ModuleType,
    loss: Tensor,
    terms: Terms,
    shape: LossShape,
    *,
    ref_logp: Tensor | None,
    entropy: Tensor | None = None,
    decay_next: Tensor | None = None,
) -> Tensor:
    """fp32 [K], one number per name in ``metric_names``; all zero where there is no valid row.

    Args:
        backend: computes them (``portable.klq_metrics``, which documents the other arguments).
    """
    names = metric_names(
        on_policy=terms.old_logp is None,
        reference=ref_logp is not None,
        loss_type=shape.loss_type,
        entropy=entropy is not None,
    )
    if terms.logp.numel() == 0:
        return loss.new_zeros(len(names))
    found: Tensor = backend.klq_metrics(
        names, loss, terms, shape, ref_logp=ref_logp, entropy=entropy, decay_next=decay_next
    )
    return found
