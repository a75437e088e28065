"""All metrics of a call in one launch: ``portable.klq_metrics``, where each of them is several.

One program reads the rows twice: for the sums, and then, with the means known, for the variances. A call has a few
numbers per row, so this takes microseconds where launching forty operators takes as many as the host needs.
Neighbouring threads take neighbouring rows, as in ``klq_residual``.

Each metric is stored at the place that ``metric_names`` gives it; ``ABSENT`` marks those that the call does not have.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import LossShape, Terms
from .launch import KLQ_METRICS, on_device, require_contiguous
from .math import LOG2E

ABSENT = tl.constexpr(-1)


@triton.jit
def _exp_rest(d):
    """e^d - 1 - d, by its series where the difference would cancel."""
    r = tl.fma(d, 1.0 / 362880, 1.0 / 40320)
    r = tl.fma(d, r, 1.0 / 5040)
    r = tl.fma(d, r, 1.0 / 720)
    r = tl.fma(d, r, 1.0 / 120)
    r = tl.fma(d, r, 1.0 / 24)
    r = tl.fma(d, r, 1.0 / 6)
    r = tl.fma(d, r, 0.5)
    return tl.where(tl.abs(d) < 0.5, d * d * r, tl.exp2(d * LOG2E) - 1.0 - d)


@triton.jit
def _put(out, total, n, SLOT: tl.constexpr):
    """Stores a mean at its place."""
    if SLOT != ABSENT:
        tl.store(out + SLOT, tl.sum(total) / n)


@triton.jit
def klq_metrics_kernel(
    loss_sum, logp, values, old_logp, old_values, advantages, ref_logp, entropy, decay_next, out,
    n, tau, alpha, value_clip, log_ratio_clip,
    LOSS: tl.constexpr, VALUE_MEAN: tl.constexpr, ADVANTAGE_MEAN: tl.constexpr, RESIDUAL_RMS: tl.constexpr,
    EXPLAINED_VARIANCE: tl.constexpr, TD_ERROR_RMS: tl.constexpr, KL_OLD_K1: tl.constexpr, KL_OLD_K3: tl.constexpr,
    Q_MEAN: tl.constexpr, LOG_RATIO_MEAN: tl.constexpr, KL_REF_K1: tl.constexpr, KL_REF_K3: tl.constexpr,
    VALUE_CLIP_FRACTION: tl.constexpr, LOG_RATIO_CLIP_FRACTION: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    zeros = tl.zeros([BLOCK], tl.float32)
    v_sum = zeros
    a_sum = zeros
    old_v_sum = zeros
    residual_sum = zeros
    td_sum = zeros
    d_sum = zeros
    k3_old_sum = zeros
    rho_sum = zeros
    k3_ref_sum = zeros
    value_clips = zeros
    ratio_clips = zeros
    entropy_sum = zeros
    for start in range(0, n, BLOCK):
        i = tl.max_contiguous(start + tl.arange(0, BLOCK), 1)
        inside = i < n
        v = tl.load(values + i, mask=inside, other=0.0)
        a = tl.load(advantages + i, mask=inside, other=0.0)
        v_sum += v
        a_sum += a
        change = zeros
        if old_logp is not None:
            old_v = tl.load(old_values + i, mask=inside, other=0.0)
            d = tl.load(logp + i, mask=inside, other=0.0) - tl.load(old_logp + i, mask=inside, other=0.0)
            change = tl.fma(d, tau, v - old_v)
            old_v_sum += old_v
            d_sum += d
            k3_old_sum += _exp_rest(d)
            ratio_clips += (tl.abs(d) > log_ratio_clip).to(tl.float32)
        e = tl.fma(-alpha, a, change)
        residual_sum += e * e
        value_clips += (tl.abs(change) > value_clip).to(tl.float32)
        if decay_next is not None:
            decay = tl.load(decay_next + i, mask=inside, other=0.0)
            following = tl.load(advantages + i + 1, mask=i + 1 < n, other=0.0)
            td = tl.where(decay == 0.0, a, tl.fma(-decay, following, a))
            td_sum += td * td
        if ref_logp is not None:
            rho = tl.load(logp + i, mask=inside, other=0.0) - tl.load(ref_logp + i, mask=inside, other=0.0)
            rho_sum += rho
            k3_ref_sum += _exp_rest(-rho)
        if entropy is not None:
            entropy_sum += tl.load(entropy + i, mask=inside, other=0.0)
    number = tl.full([], 0.0, tl.float32) + n  # of one row the launcher makes a constant, which has no .to
    v_mean = tl.sum(v_sum) / number
    a_mean = tl.sum(a_sum) / number
    base_mean = v_mean  # of V at the old policy, on which the lambda-return R = A + V stands
    if old_logp is not None:
        base_mean = tl.sum(old_v_sum) / number

    spread_sum = zeros
    left_sum = zeros
    for start in range(0, n, BLOCK):
        i = tl.max_contiguous(start + tl.arange(0, BLOCK), 1)
        inside = i < n
        v = tl.load(values + i, mask=inside, other=0.0)
        a = tl.load(advantages + i, mask=inside, other=0.0)
        base = v
        if old_logp is not None:
            base = tl.load(old_values + i, mask=inside, other=0.0)
        spread = (a + base) - (a_mean + base_mean)
        left = (a + (base - v)) - (a_mean + (base_mean - v_mean))
        spread_sum += tl.where(inside, spread * spread, 0.0)
        left_sum += tl.where(inside, left * left, 0.0)
    variance = tl.sum(spread_sum)
    explained = tl.where(variance == 0.0, 0.0, 1.0 - tl.sum(left_sum) / variance)

    rho_mean = tl.sum(rho_sum) / number
    tl.store(out + LOSS, tl.load(loss_sum))
    tl.store(out + VALUE_MEAN, v_mean)
    tl.store(out + ADVANTAGE_MEAN, a_mean)
    tl.store(out + RESIDUAL_RMS, tl.sqrt(tl.sum(residual_sum) / number))
    tl.store(out + EXPLAINED_VARIANCE, explained)
    if TD_ERROR_RMS != ABSENT:
        tl.store(out + TD_ERROR_RMS, tl.sqrt(tl.sum(td_sum) / number))
    _put(out, -d_sum, number, KL_OLD_K1)
    _put(out, k3_old_sum, number, KL_OLD_K3)
    if Q_MEAN != ABSENT:
        tl.store(out + Q_MEAN, tl.fma(tau, rho_mean, v_mean))
        tl.store(out + LOG_RATIO_MEAN, rho_mean)
        tl.store(out + KL_REF_K1, rho_mean)
    _put(out, k3_ref_sum, number, KL_REF_K3)
    _put(out, value_clips, number, VALUE_CLIP_FRACTION)
    _put(out, ratio_clips, number, LOG_RATIO_CLIP_FRACTION)
    _put(out, entropy_sum, number, ENTROPY)


# The kernel's parameters that say where each metric goes: a metric that it does not know fails to launch.
SLOTS = [name for name in klq_metrics_kernel.arg_names if name.isupper() and name != "BLOCK"]


def klq_metrics(
    names: list[str],
    loss: Tensor,
    terms: Terms,
    shape: LossShape,
    *,
    ref_logp: Tensor | None,
    entropy: Tensor | None = None,
    decay_next: Tensor | None = None,
) -> Tensor:
    """See ``portable.klq_metrics``."""
    require_contiguous(*terms, ref_logp, entropy, decay_next)
    out = loss.new_empty(len(names))
    slots = dict.fromkeys(SLOTS, ABSENT.value) | {name.upper(): slot for slot, name in enumerate(names)}
    logp, values, old_logp, old_values, advantages, _ = terms
    with on_device(out):
        klq_metrics_kernel[(1,)](
            loss, logp, values, old_logp, old_values, advantages, ref_logp, entropy, decay_next, out,
            terms.logp.numel(), shape.tau, shape.alpha, shape.value_clip, shape.log_ratio_clip, **slots,
            **KLQ_METRICS.sizes, **KLQ_METRICS.options,
        )  # fmt: skip
    return out
