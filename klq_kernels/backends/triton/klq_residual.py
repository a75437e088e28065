"""The KLQ loss of each token and its derivatives by logp and V, element by element.

Restates ``reference.klq_residual_loss`` with its gradient worked out: d_logp = tau de and d_V = de, for e^2 with
de = 2 e and for Huber with de = clip(e). Where a clipped square is the larger one, what was clipped passes no gradient.

Neighbouring threads take neighbouring tokens, so that a warp uses whole sectors whatever n is and wherever a chunk
begins. With several neighbours to a thread it would not, where the last of them cannot be loaded as one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import LossShape, Residuals, Terms
from .launch import KLQ_RESIDUAL, on_device, require_contiguous


@triton.jit
def _clip(x, bound):
    return tl.minimum(tl.maximum(x, -bound), bound)


@triton.jit
def _residual(change, alpha, advantage):
    """change - alpha * advantage as one fma, so that equal changes give equal residuals wherever this is inlined."""
    return tl.fma(-alpha, advantage, change)


@triton.jit
def loss_and_slopes(d, v, advantage, tau, alpha, huber_delta, value_clip, log_ratio_clip, LOSS_TYPE: tl.constexpr):
    """(loss, its derivative by logp, by V) where logp has changed by d and V by v since the rollout."""
    change = tl.fma(d, tau, v)
    e = _residual(change, alpha, advantage)
    if LOSS_TYPE == "huber":
        size = tl.abs(e)
        loss = tl.where(size <= huber_delta, 0.5 * e * e, huber_delta * (size - 0.5 * huber_delta))
        by_value = tl.where(e == e, _clip(e, huber_delta), e)  # minimum and maximum would swallow a NaN
    else:
        loss = e * e
        by_value = 2.0 * e
    by_logp = tau * by_value
    if LOSS_TYPE == "value_clipped" or LOSS_TYPE == "double_clipped":
        clipped = _residual(_clip(change, value_clip), alpha, advantage)
        wins = clipped * clipped > loss
        loss = tl.where(wins, clipped * clipped, loss)
        by_value = tl.where(wins, 0.0, by_value)
        by_logp = tl.where(wins, 0.0, by_logp)
    if LOSS_TYPE == "ratio_clipped" or LOSS_TYPE == "double_clipped":
        clipped = _residual(tl.fma(_clip(d, log_ratio_clip), tau, v), alpha, advantage)
        wins = clipped * clipped > loss
        loss = tl.where(wins, clipped * clipped, loss)
        by_value = tl.where(wins, 2.0 * clipped, by_value)
        by_logp = tl.where(wins, 0.0, by_logp)
    return loss, by_logp, by_value


@triton.jit
def klq_residual_kernel(
    logp, values, old_logp, old_values, advantages, weights, losses, d_logp, d_values, grad_scale,
    n, tau, alpha, huber_delta, value_clip, log_ratio_clip,
    LOSS_TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.max_contiguous(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 1)
    inside = i < n
    v = tl.zeros([BLOCK], tl.float32)
    d = tl.zeros([BLOCK], tl.float32)
    if old_logp is not None:
        d = tl.load(logp + i, mask=inside) - tl.load(old_logp + i, mask=inside)
        v = tl.load(values + i, mask=inside) - tl.load(old_values + i, mask=inside)
    advantage = tl.load(advantages + i, mask=inside)
    loss, by_logp, by_value = loss_and_slopes(
        d, v, advantage, tau, alpha, huber_delta, value_clip, log_ratio_clip, LOSS_TYPE
    )
    factor = tl.load(grad_scale)
    if weights is not None:
        weight = tl.load(weights + i, mask=inside)
        loss *= weight
        by_value *= weight
        by_logp *= weight
    tl.store(losses + i, loss, mask=inside)
    tl.store(d_logp + i, by_logp * factor, mask=inside)
    tl.store(d_values + i, by_value * factor, mask=inside)


def klq_residual(terms: Terms, out: Residuals, *, grad_scale: Tensor, shape: LossShape) -> None:
    """See ``portable.klq_residual``."""
    n = terms.logp.numel()
    if n == 0:
        return
    require_contiguous(*terms, *out)
    with on_device(terms.logp):
        klq_residual_kernel[(triton.cdiv(n, KLQ_RESIDUAL.sizes["BLOCK"]),)](
            *terms, *out, grad_scale, n, shape.tau, shape.alpha, shape.huber_delta, shape.value_clip,
            shape.log_ratio_clip, LOSS_TYPE=shape.loss_type,
            **KLQ_RESIDUAL.sizes, **KLQ_RESIDUAL.options,
        )  # fmt: skip
