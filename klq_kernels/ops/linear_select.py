"""klq_kernels::linear_select: the logits of k ids per position under a linear head.

Forward keeps the slope of a soft cap and nothing else: without one the logits are linear.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import backend_for
from ..call import layout
from ..vocabulary.chunks import Chosen, Needs, States
from ..vocabulary.selected import selected_gradients, selected_logits
from .head import Gradients, fake_gradients, rounded_gradients
from .operator import Operator, Parts


class BackwardArguments(NamedTuple):
    """The inputs of the forward, the slopes that it found, and the gradient by its logits, flat."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V A, H]
    bias: Tensor | None  # [V A]
    ids: Tensor  # int64 [M, k]
    # ``Layout.row_args``
    mask: Tensor | None
    cu_seqlens: Tensor
    rows: Tensor | None
    # fp32 [M, k, A]
    slope: Tensor | None  # where there is a soft cap
    d_logits: Tensor
    temperature: float
    need_hidden: bool
    need_weight: bool
    need_bias: bool


class Arguments(NamedTuple):
    """Flat tensors of M positions; ``layout.valid_rows`` finds the valid ones."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V A, H]
    bias: Tensor | None  # [V A]
    ids: Tensor  # int64 [M, k]
    # ``Layout.row_args``
    mask: Tensor | None
    cu_seqlens: Tensor
    rows: Tensor | None
    atoms: int  # A
    temperature: float
    softcap: float | None


class Results(NamedTuple):
    """fp32 [M, k, A], 0 at masked positions; ``slope``, which is for backward, is empty without a soft cap."""

    logits: Tensor
    slope: Tensor


def _chosen(given: Arguments | BackwardArguments, index: Tensor | None, atoms: int) -> Chosen:
    ids = layout.take_rows(given.ids, index)
    assert ids is not None
    return Chosen(States(given.hidden.detach().contiguous(), index), ids.contiguous(), atoms)


def _gradients(given: BackwardArguments) -> Gradients:
    """The gradients of the head's inputs, from sums of a few rows each."""
    hidden = given.hidden
    index, _ = layout.valid_rows(given.mask, given.cu_seqlens, given.rows, hidden.shape[0])
    d_logits = layout.fp32_rows(given.d_logits, index)
    assert d_logits is not None
    found = selected_gradients(
        backend_for(hidden.device),
        _chosen(given, index, given.d_logits.shape[-1]),
        given.weight.detach().contiguous(),
        Needs(given.need_hidden, given.need_weight, given.need_bias),
        d_logits,
        layout.fp32_rows(given.slope, index),
        scale=1.0 / given.temperature,
    )
    return rounded_gradients(found, given)


BACKWARD_PARTS = Parts(BackwardArguments, Gradients, _gradients, fake_gradients)
linear_select_backward = Operator("klq_kernels::linear_select_backward", BACKWARD_PARTS)


def _forward(given: Arguments) -> Results:
    """The logits at each position."""
    positions = given.hidden.shape[0]
    index, _ = layout.valid_rows(given.mask, given.cu_seqlens, given.rows, positions)
    chosen = _chosen(given, index, given.atoms)
    layout.check_actions(chosen.ids, given.weight.shape[0] // given.atoms, name="ids")
    logits, slope = selected_logits(
        backend_for(given.hidden.device),
        chosen,
        given.weight.detach().contiguous(),
        None if given.bias is None else given.bias.detach().float().contiguous(),
        scale=1.0 / given.temperature,
        softcap=given.softcap,
    )
    logits = layout.put_rows(logits, index, positions)
    return Results(logits, logits.new_empty(0) if slope is None else layout.put_rows(slope, index, positions))


def _fake(given: Arguments) -> Results:
    logits = given.hidden.new_empty(*given.ids.shape, given.atoms, dtype=torch.float32)
    return Results(logits, logits.new_empty(0) if given.softcap is None else torch.empty_like(logits))


SAVED = ("hidden", "weight", "bias", "ids", "mask", "cu_seqlens", "rows")


def _setup(ctx: Any, given: Arguments, found: Results) -> None:
    ctx.mark_non_differentiable(found.slope)
    slope = None if given.softcap is None else found.slope
    ctx.save_for_backward(*(getattr(given, name) for name in SAVED), slope)
    ctx.temperature = given.temperature


def _backward(ctx: Any, by: Results, needs: dict[str, bool]) -> dict[str, Tensor | None]:
    saved = dict(zip((*SAVED, "slope"), ctx.saved_tensors, strict=True))
    gradients = Gradients(
        *linear_select_backward(
            *BackwardArguments(
                **saved,
                d_logits=by.logits,
                temperature=ctx.temperature,
                need_hidden=needs["hidden"],
                need_weight=needs["weight"],
                need_bias=needs["bias"],
            )
        )
    )
    return {name: getattr(gradients, f"d_{name}") for name in ("hidden", "weight", "bias") if needs[name]}


PARTS = Parts(Arguments, Results, _forward, _fake, _setup, _backward)
linear_select = Operator("klq_kernels::linear_select", PARTS)
