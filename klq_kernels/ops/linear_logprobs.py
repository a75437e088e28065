"""klq_kernels::linear_logprobs: log-probability, log-normaliser and entropy of the taken token under a linear head.

Forward keeps four numbers per row. Backward recomputes each chunk of logits: the gradient depends on what the caller
does with the outputs, so, unlike in ``fused_loss``, it cannot be formed ahead of time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import backend_for
from ..call import layout
from ..vocabulary.chunks import Needs, Pull, Rows
from ..vocabulary.one_pass import logprobs_backward_pass, logprobs_pass
from .fused_loss import make_head, weight_gradient_dtype


@torch.library.custom_op("klq_kernels::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, lse, entropy, top, log_total), fp32 [M], 0 at masked positions; entropy is empty unless asked for.

    ``top`` and ``log_total`` are for backward: lse in the two parts of ``portable.row_stats``.
    """
    index, _ = layout.valid_rows(mask, cu_seqlens, rows, actions.numel())
    taken = layout.take_rows(actions, index)
    assert taken is not None
    layout.check_actions(taken, weight.shape[0])
    head = make_head(hidden, weight, bias, temperature, softcap, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        top, log_total, logp, entropy = logprobs_pass(
            backend_for(hidden.device),
            Rows(hidden.detach(), index, taken),
            head,
            entropy=return_entropy,
            workspace_bytes=workspace_bytes,
        )
    lse = torch.add(log_total, top, alpha=head.scale)

    def put(vector: Tensor | None) -> Tensor:
        return logp.new_empty(0) if vector is None else layout.put_rows(vector, index, actions.numel())

    return put(logp), put(lse), put(entropy), put(top), put(log_total)


@linear_logprobs.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor, *args: Any) -> tuple[Tensor, ...]:
    logp = hidden.new_empty(actions.shape[0], dtype=torch.float32)
    entropy = torch.empty_like(logp) if args[5] else logp.new_empty(0)
    return logp, torch.empty_like(logp), entropy, torch.empty_like(logp), torch.empty_like(logp)


@torch.library.custom_op("klq_kernels::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    top: Tensor,
    log_total: Tensor,
    entropy: Tensor | None,
    d_logp: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias) in the dtypes of hidden, weight and bias; gradients nobody needs are empty."""
    index, _ = layout.valid_rows(mask, cu_seqlens, rows, actions.numel())

    def take(tensor: Tensor | None) -> Any:
        return layout.fp32_rows(tensor, index)

    taken = layout.take_rows(actions, index)
    assert taken is not None
    normaliser = take(top), take(log_total)
    by_logp = torch.zeros_like(normaliser[0]) if d_logp is None else take(d_logp)
    by_lse = -by_logp if d_lse is None else take(d_lse) - by_logp
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = logprobs_backward_pass(
            backend_for(hidden.device),
            Rows(hidden.detach(), index, taken),
            make_head(
                hidden,
                weight,
                bias,
                temperature,
                softcap,
                weight_gradient_dtype(hidden, weight, workspace_bytes, keep=False),
            ),
            Needs(need_hidden, need_weight, need_bias),
            Pull(*normaliser, by_logp, by_lse, take(d_entropy), take(entropy)),
            workspace_bytes=workspace_bytes,
        )

    def given(gradient: Tensor | None, like: Tensor | None) -> Tensor:
        if gradient is None or like is None:
            return hidden.new_empty(0)
        return gradient.to(like.dtype)

    return given(gradients.hidden, hidden), given(gradients.weight, weight), given(gradients.bias, bias)


@linear_logprobs_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    empty = hidden.new_empty(0)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed and t is not None else empty.new_empty(0)
        for t, needed in zip((hidden, weight, bias), args[-3:], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, actions, mask, cu_seqlens, rows, *ctx.settings = inputs
    _, _, entropy, top, log_total = output
    ctx.mark_non_differentiable(top, log_total)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, actions, mask, cu_seqlens, rows, top, log_total, entropy)


def _backward(
    ctx: Any, d_logp: Tensor | None, d_lse: Tensor | None, d_entropy: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *inputs, entropy = ctx.saved_tensors
    temperature, softcap, return_entropy, workspace_bytes = ctx.settings
    needs = ctx.needs_input_grad[:3]
    gradients = linear_logprobs_backward(
        *inputs, entropy if return_entropy else None, d_logp, d_lse, d_entropy if return_entropy else None,
        temperature, softcap, workspace_bytes, *needs,
    )  # fmt: skip
    return (*(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 8)


linear_logprobs.register_autograd(_backward, setup_context=_setup_context)


def _second_derivative(*_: Any) -> None:
    raise RuntimeError("linear_logprobs: there is no second derivative; use klq_kernels.reference")


linear_logprobs_backward.register_autograd(_second_derivative)
