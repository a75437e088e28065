"""klq_kernels::klq_loss: the loss and its metrics from given log-probabilities."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import backend_for
from ..call import layout
from ..vocabulary.chunks import LossShape, Residuals, Terms, each
from ..vocabulary.metrics import klq_metrics, metric_names
from .fused_loss import GradientScale
from .gradients import scaled_gradient
from .operator import Operator, Parts, fields_of


class Arguments(NamedTuple):
    """Flat tensors of M positions; ``layout.valid_rows`` finds the valid ones."""

    logp: Tensor
    values: Tensor
    old_logp: Tensor
    old_values: Tensor
    advantages: Tensor
    ref_logp: Tensor | None  # only adds metrics
    weights: Tensor | None
    # ``Layout.row_args``
    mask: Tensor | None
    cu_seqlens: Tensor
    rows: Tensor | None
    denom: Tensor | None  # 0-d
    # ``LossShape``
    tau: float
    alpha: float
    loss_type: str
    huber_delta: float
    value_clip: float
    log_ratio_clip: float


class Results(NamedTuple):
    """The loss, and what backward needs of it: fp32 [M] gradients and the unit of ``GradientScale``."""

    loss: Tensor
    metrics: Tensor  # in the order of ``metric_names``
    d_logp: Tensor
    d_values: Tensor
    unit: Tensor


def _fake(given: Arguments) -> Results:
    names = metric_names(
        on_policy=False, reference=given.ref_logp is not None, loss_type=given.loss_type, entropy=False
    )
    scalar = given.logp.new_empty((), dtype=torch.float32)
    d_logp, d_values = (torch.empty_like(given.logp, dtype=torch.float32) for _ in range(2))
    return Results(scalar, scalar.new_empty(len(names)), d_logp, d_values, scalar.new_empty(()))


def _setup(ctx: Any, given: Arguments, found: Results) -> None:
    _, *described = found
    ctx.mark_non_differentiable(*described)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(found.d_logp, found.d_values, found.unit)
    ctx.dtypes = {"logp": given.logp.dtype, "values": given.values.dtype}


def _backward(ctx: Any, by: Results, needs: dict[str, bool]) -> dict[str, Tensor | None]:
    if by.loss is None:
        return {}
    *saved, unit = ctx.saved_tensors
    scale = by.loss.float() * unit
    return {
        name: scaled_gradient(gradient, scale, dtype, owned=False)
        for (name, dtype), gradient in zip(ctx.dtypes.items(), saved, strict=True)
        if needs[name]
    }


def _forward(given: Arguments) -> Results:
    """The loss, its metrics and its gradients by log-probabilities and values."""
    positions = given.logp.numel()
    index, _ = layout.valid_rows(given.mask, given.cu_seqlens, given.rows, positions)
    layout.check_denom(given.denom)
    terms: Terms = each(fields_of(Terms, given), lambda vector: layout.fp32_rows(vector, index))  # type: ignore[arg-type, return-value]
    shape: LossShape = fields_of(LossShape, given)
    scale = GradientScale(given.denom, terms.logp.numel(), given.logp.dtype, given.logp.device)
    residuals = Residuals(*(torch.empty_like(terms.logp) for _ in range(3)))
    backend = backend_for(given.logp.device)
    backend.klq_residual(terms, residuals, grad_scale=scale.grad_scale, shape=shape)
    loss = scale.mean(residuals.losses)
    metrics = klq_metrics(backend, loss, terms, shape, ref_logp=layout.fp32_rows(given.ref_logp, index))
    d_logp, d_values = (layout.put_rows(d, index, positions) for d in (residuals.d_logp, residuals.d_values))
    return Results(loss, metrics, d_logp, d_values, scale.unit)


PARTS = Parts(Arguments, Results, _forward, _fake, _setup, _backward)
klq_loss = Operator("klq_kernels::klq_loss", PARTS)
