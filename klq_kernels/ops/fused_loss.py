"""klq_kernels::fused_klq_loss: the loss and all its gradients in one pass over the vocabulary.

The gradients are outputs of the forward; backward only multiplies them by the incoming scalar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import backend_for, vocabulary_major
from ..call import layout
from ..vocabulary import chunking
from ..vocabulary.chunks import Head, LossShape, Needs, Rows, ScanTerms, Terms
from ..vocabulary.metrics import klq_metrics, metric_names
from ..vocabulary.one_pass import ScanInputs, klq_pass
from .gradients import scaled_gradient
from .scans import tail_values


class GradientScale:
    """loss = sum / denom, with 1 / denom = grad_scale * unit: gradients are carried at grad_scale, for backward to
    multiply by unit. That is a power of two near 1 / denom where they would underflow in fp16, and otherwise 1.
    """

    def __init__(self, denom: Tensor | None, n: int, dtype: torch.dtype, device: torch.device) -> None:
        if denom is None:
            denom = torch.full((), max(n, 1), dtype=torch.float32, device=device)
        denom = denom.detach().to(device=device, dtype=torch.float32).reshape(())
        self.unit = torch.ones_like(denom)
        if dtype == torch.float16:
            denom, power = torch.frexp(denom)
            self.unit = torch.ldexp(self.unit, -power)
        self.grad_scale = denom.reciprocal()

    def mean(self, losses: Tensor) -> Tensor:
        """sum(losses) / denom; 0 where there is no row at all."""
        if losses.numel() == 0:
            return torch.zeros((), dtype=torch.float32, device=losses.device)
        return losses.sum() * self.grad_scale * self.unit


def make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    gradient_dtype: torch.dtype,
) -> Head:
    """The head in the dtype of ``hidden``: products run in it, an fp32 master weight is cast for them."""
    weight = weight.detach().to(hidden.dtype)
    bias = None if bias is None else bias.detach().to(hidden.dtype)
    return Head(weight, bias, 1.0 / temperature, softcap, gradient_dtype)


def weight_gradient_dtype(
    hidden: Tensor, weight: Tensor, workspace_bytes: int | None, *, keep: bool = True
) -> torch.dtype:
    """``chunking.weight_gradient_dtype`` of these inputs."""
    return chunking.weight_gradient_dtype(
        hidden.shape[0], weight.shape[0], weight.shape[1], hidden.dtype, weight.dtype, hidden.device, workspace_bytes,
        vocabulary_major=vocabulary_major(hidden.device), keep=keep,
    )  # fmt: skip


@torch.library.custom_op("klq_kernels::fused_klq_loss", mutates_args=())
def fused_klq_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    values: Tensor,
    old_logp: Tensor | None,
    old_values: Tensor | None,
    advantages: Tensor | None,
    ref_logp: Tensor | None,
    rewards: Tensor | None,
    scores: Tensor | None,
    bootstrap_values: Tensor | None,
    trace: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    denom: Tensor | None,
    gamma: float,
    lam: float,
    tau: float,
    alpha: float,
    loss_type: str,
    huber_delta: float,
    value_clip: float,
    log_ratio_clip: float,
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
    workspace_bytes: int | None,
    own_gradients: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, d_hidden, d_weight, d_bias, d_values, unit); gradients nobody needs are empty.

    ``own_gradients`` is the caller's word that it drops the gradients among the outputs, so that backward may scale
    them in place instead of allocating them a second time.
    """
    positions = actions.numel()
    index, row_cu_seqlens = layout.valid_rows(mask, cu_seqlens, rows, positions)

    def take(tensor: Tensor | None) -> Any:
        return layout.fp32_rows(tensor, index)

    taken = layout.take_rows(actions, index)
    assert taken is not None
    layout.check_actions(taken, weight.shape[0])
    n = taken.numel()
    row_values = take(values)
    ref_rows = take(ref_logp)
    errors = torch.empty_like(row_values) if advantages is None else take(advantages)
    terms = Terms(torch.empty_like(row_values), row_values, take(old_logp), take(old_values), errors, take(weights))
    scan = decay_next = None
    if advantages is None:
        tail = tail_values(row_cu_seqlens, bootstrap_values, scores, gamma)
        factors = take(trace)
        scan_terms = ScanTerms(terms.logp, ref_rows, row_values, take(rewards), factors)
        scan = ScanInputs(scan_terms, tail, row_cu_seqlens, gamma, lam)
        decay = torch.full_like(row_values, gamma * lam) if factors is None else gamma * lam * factors.roll(-1)
        decay_next = decay.masked_fill(layout.sequence_ends(row_cu_seqlens, n), 0.0)
    shape = LossShape(tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip)
    scale = GradientScale(denom, n, hidden.dtype, hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        result = klq_pass(
            backend_for(hidden.device),
            Rows(hidden.detach(), index, taken),
            make_head(
                hidden, weight, bias, temperature, softcap, weight_gradient_dtype(hidden, weight, workspace_bytes)
            ),
            Needs(need_hidden, need_weight, need_bias),
            terms,
            scan,
            shape,
            grad_scale=scale.grad_scale,
            entropy=return_entropy,
            workspace_bytes=workspace_bytes,
        )
    loss = scale.mean(result.losses)
    metrics = klq_metrics(loss, terms, shape, ref_logp=ref_rows, entropy=result.entropy, decay_next=decay_next)
    d_values = layout.put_rows(result.d_values, index, positions) if need_values else loss.new_empty(0)

    def given(gradient: Tensor | None) -> Tensor:
        return loss.new_empty(0) if gradient is None else gradient

    return (
        loss,
        metrics,
        given(result.d_hidden),
        given(result.d_weight),
        given(result.d_bias),
        d_values,
        scale.unit,
    )


@fused_klq_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor, *args: Any) -> tuple[Tensor, ...]:
    (ref_logp, loss_type, return_entropy, workspace_bytes) = args[4], args[18], args[24], args[25]
    need_hidden, need_weight, need_bias, need_values = args[-4:]
    names = metric_names(
        on_policy=args[1] is None, reference=ref_logp is not None, loss_type=loss_type, entropy=return_entropy
    )
    scalar = hidden.new_empty((), dtype=torch.float32)

    def shaped(needed: bool, *shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype) if needed else scalar.new_empty(0)

    return (
        scalar,
        scalar.new_empty(len(names)),
        shaped(need_hidden, *hidden.shape, dtype=hidden.dtype),
        shaped(need_weight, *weight.shape, dtype=weight_gradient_dtype(hidden, weight, workspace_bytes)),
        shaped(need_bias, weight.shape[0]),
        shaped(need_values, actions.shape[0]),
        scalar.new_empty(()),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, *gradients, unit = output
    ctx.mark_non_differentiable(metrics, *gradients, unit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients, unit)
    ctx.own_gradients, *ctx.needs = inputs[-5:]
    hidden, weight, bias, _, values = inputs[:5]
    ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, values)]
    ctx.inputs = len(inputs)


def _backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    out: list[Tensor | None] = [None] * ctx.inputs
    if d_loss is not None:
        *saved, unit = ctx.saved_tensors
        scale = d_loss.float() * unit
        for slot, gradient, needed, dtype in zip((0, 1, 2, 4), saved, ctx.needs, ctx.dtypes, strict=True):
            if needed:
                out[slot] = scaled_gradient(gradient, scale, dtype, owned=ctx.own_gradients)
    return tuple(out)


fused_klq_loss.register_autograd(_backward, setup_context=_setup_context)
