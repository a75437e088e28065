"""klq_kernels::klq_loss: the loss and its metrics from log-probabilities that somebody else computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import backend_for
from ..call import layout
from ..vocabulary.chunks import LossShape, Residuals, Terms
from ..vocabulary.metrics import klq_metrics, metric_names
from .fused_loss import GradientScale
from .gradients import scaled_gradient


@torch.library.custom_op("klq_kernels::klq_loss", mutates_args=())
def klq_loss(
    logp: Tensor,
    values: Tensor,
    old_logp: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    ref_logp: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    denom: Tensor | None,
    tau: float,
    alpha: float,
    loss_type: str,
    huber_delta: float,
    value_clip: float,
    log_ratio_clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, d_logp, d_values, unit)."""
    positions = logp.numel()
    index, _ = layout.valid_rows(mask, cu_seqlens, rows, positions)

    def take(tensor: Tensor | None) -> Any:
        return layout.fp32_rows(tensor, index)

    columns = (logp, values, old_logp, old_values, advantages, weights)
    terms = Terms(*(take(column) for column in columns))
    shape = LossShape(tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip)
    scale = GradientScale(denom, terms.logp.numel(), logp.dtype, logp.device)
    residuals = Residuals(*(torch.empty_like(terms.logp) for _ in range(3)))
    backend_for(logp.device).klq_residual(terms, residuals, grad_scale=scale.grad_scale, shape=shape)
    loss = scale.mean(residuals.losses)
    metrics = klq_metrics(loss, terms, shape, ref_logp=take(ref_logp))
    d_logp, d_values = (layout.put_rows(d, index, positions) for d in residuals[1:])
    return loss, metrics, d_logp, d_values, scale.unit


@klq_loss.register_fake
def _(logp: Tensor, *args: Any) -> tuple[Tensor, ...]:
    names = metric_names(on_policy=False, reference=args[4] is not None, loss_type=args[12], entropy=False)
    scalar = logp.new_empty((), dtype=torch.float32)
    per_token = [torch.empty_like(logp, dtype=torch.float32) for _ in range(2)]
    return scalar, scalar.new_empty(len(names)), *per_token, scalar.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *described = output
    ctx.mark_non_differentiable(*described)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*described[1:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.inputs = len(inputs)


def _backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    out: list[Tensor | None] = [None] * ctx.inputs
    if d_loss is not None:
        *saved, unit = ctx.saved_tensors
        scale = d_loss.float() * unit
        for slot in (0, 1):
            if ctx.needs_input_grad[slot]:
                out[slot] = scaled_gradient(saved[slot], scale, ctx.dtypes[slot], owned=False)
    return tuple(out)


klq_loss.register_autograd(_backward, setup_context=_setup_context)
