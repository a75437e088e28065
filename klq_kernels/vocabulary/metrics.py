"""The names and definitions of the metrics of a call.

Means are true means over the valid tokens, whatever ``denom`` and ``weights`` the loss was given. rho is the log-ratio
against the reference, d the one against the old policy; tokens are taken as sampled from the policy (kl_ref) or from
the old policy (kl_old). k1 and k3 are the usual one-sample estimators: k1 unbiased, k3 unbiased and never negative.
"""

from __future__ import annotations

ALL_METRICS = (
    "loss", "value_mean", "advantage_mean", "residual_rms", "explained_variance", "td_error_rms", "kl_old_k1",
    "kl_old_k3", "q_mean", "log_ratio_mean", "kl_ref_k1", "kl_ref_k3", "value_clip_fraction",
    "log_ratio_clip_fraction", "entropy",
)  # fmt: skip


def metric_names(*, on_policy: bool, reference: bool, loss_type: str, entropy: bool) -> list[str]:
    """The keys of ``KLQLoss.metrics`` for such a call, in the order in which ``portable.klq_metrics`` gives them."""
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
