"""klq_kernels::reverse_scan, ::lambda_errors and ::klq_targets: the backward recurrences over time.

All step over masked tokens by themselves, so none needs to know how many there are: no synchronisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import backend_for
from ..call import layout
from ..vocabulary.chunks import ScanTerms, each


@torch.library.custom_op("klq_kernels::reverse_scan", mutates_args=())
def reverse_scan(delta: Tensor, decay: Tensor, mask: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """A_t = delta_t + decay_t A_{t+1}, fp32 [M]; ``decay`` is [M] or holds one element."""
    layout.check_cu_seqlens(cu_seqlens, delta.numel())
    out = torch.empty(delta.shape, dtype=torch.float32, device=delta.device)
    if out.numel():
        backend_for(delta.device).reverse_scan(delta.contiguous(), decay.contiguous(), mask, cu_seqlens, out)
    return out


@reverse_scan.register_fake
def _(delta: Tensor, decay: Tensor, mask: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    return torch.empty_like(delta, dtype=torch.float32, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    delta, decay, mask, cu_seqlens = inputs
    ctx.save_for_backward(decay, mask, cu_seqlens, output)
    ctx.dtypes = delta.dtype, decay.dtype


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    """The adjoint runs forwards in time: D_t = dA_t + decay_{t-1} D_{t-1}, and ddecay_t = D_t A_{t+1}.

    That is a reverse scan over the mirrored array, each token bringing the decay of the valid token before it.
    """
    decay, mask, cu_seqlens, out = ctx.saved_tensors
    m = d_out.numel()
    decays = decay.float().expand(m)
    previous, following = _neighbours(mask, cu_seqlens, m)
    carried = torch.where(previous < 0, 0.0, decays[previous.clamp(min=0)])
    mirrored_ends = (m - cu_seqlens).flip(0).to(torch.int32)
    mirrored_mask = None if mask is None else mask.flip(0)
    d_delta = reverse_scan(d_out.float().flip(0), carried.flip(0), mirrored_mask, mirrored_ends).flip(0)
    d_decay = None
    if ctx.needs_input_grad[1]:
        next_out = torch.where(following < 0, 0.0, out[following.clamp(min=0)])
        d_decay = d_delta * next_out if mask is None else torch.where(mask, d_delta * next_out, 0.0)
        d_decay = d_decay.to(ctx.dtypes[1])
        if decay.numel() != m:
            d_decay = d_decay.sum().reshape(decay.shape)
    return (d_delta.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None), d_decay, None, None


def _neighbours(mask: Tensor | None, cu_seqlens: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(position of the previous valid token, of the next one) in the same sequence, int64 [m], -1 where none."""
    position = torch.arange(m, device=cu_seqlens.device)
    sequence = torch.bucketize(position, cu_seqlens[1:].long(), right=True)
    begin, end = cu_seqlens.long()[sequence], cu_seqlens.long()[sequence + 1]
    valid = position if mask is None else torch.where(mask, position, -1)
    latest = torch.cummax(valid, 0).values.roll(1)
    valid = position if mask is None else torch.where(mask, position, m)
    earliest = torch.cummin(valid.flip(0), 0).values.flip(0).roll(-1)
    previous = torch.where((position > begin) & (latest >= begin), latest, -1)
    return previous, torch.where((position + 1 < end) & (earliest < end), earliest, -1)


reverse_scan.register_autograd(_backward, setup_context=_setup_context)


def tail_values(cu_seqlens: Tensor, bootstrap_values: Tensor | None, scores: Tensor | None, gamma: float) -> Tensor:
    """fp32 [B]: the term after the last token of each sequence, gamma * bootstrap + score (``lambda_errors``)."""
    bootstrap, score = layout.fp32_rows(bootstrap_values, None), layout.fp32_rows(scores, None)
    if bootstrap is not None:
        return gamma * bootstrap if score is None else torch.add(score, bootstrap, alpha=gamma)
    if score is not None:
        return score
    return torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float32, device=cu_seqlens.device)


@torch.library.custom_op("klq_kernels::lambda_errors", mutates_args=())
def lambda_errors(
    logp: Tensor | None,
    ref_logp: Tensor | None,
    values: Tensor,
    rewards: Tensor | None,
    trace: Tensor | None,
    tail: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    tau: float,
    gamma: float,
    lam: float,
) -> Tensor:
    """The lambda-errors of ``portable.lambda_errors``, fp32 [M]. Not differentiable: targets carry no gradient."""
    out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    terms = ScanTerms(logp, ref_logp, values, rewards, trace)
    _write_lambda_errors(terms, tail, mask, cu_seqlens, out, tau=tau, gamma=gamma, lam=lam)
    return out


@lambda_errors.register_fake
def _(logp: Tensor | None, ref_logp: Tensor | None, values: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(values, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.library.custom_op("klq_kernels::klq_targets", mutates_args=())
def klq_targets(
    logp: Tensor | None,
    ref_logp: Tensor | None,
    values: Tensor,
    rewards: Tensor | None,
    trace: Tensor | None,
    tail: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    tau: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(old_logp, empty where None; old_values; lambda-errors), fp32 [M]: all that a rollout keeps, in one go."""
    out, old_values = (torch.empty(values.shape, dtype=torch.float32, device=values.device) for _ in range(2))
    old_logp = torch.empty_like(out) if logp is not None else out.new_empty(0)
    _write_lambda_errors(
        ScanTerms(logp, ref_logp, values, rewards, trace), tail, mask, cu_seqlens, out, tau=tau, gamma=gamma, lam=lam,
        kept_logp=None if logp is None else old_logp, kept_values=old_values,
    )  # fmt: skip
    return old_logp, old_values, out


@klq_targets.register_fake
def _(logp: Tensor | None, ref_logp: Tensor | None, values: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(values, dtype=torch.float32, memory_format=torch.contiguous_format)
    return out.new_empty(0 if logp is None else out.numel()), torch.empty_like(out), out


def _write_lambda_errors(
    terms: ScanTerms,
    tail: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    out: Tensor,
    **options: Any,
) -> None:
    layout.check_cu_seqlens(cu_seqlens, out.numel())
    if out.numel():
        terms, tail = each(terms, Tensor.contiguous), tail.contiguous()
        backend_for(out.device).lambda_errors(terms, tail, mask, cu_seqlens, out, **options)
