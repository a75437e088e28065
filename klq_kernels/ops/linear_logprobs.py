"""klq_kernels::linear_logprobs: log-probability, log-normaliser and entropy of the taken token under a linear head.

Forward keeps four numbers per row. Backward recomputes each chunk of logits: the gradient depends on what the caller
does with the outputs, so, unlike in ``fused_loss``, it cannot be formed ahead of time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import backend_for
from ..call import layout
from ..vocabulary.chunks import Needs, Pull, Rows
from ..vocabulary.one_pass import logprobs_backward_pass, logprobs_pass
from ..vocabulary.precision import own_settings
from ..vocabulary.sampling import Sampling
from .head import Gradients, fake_gradients, make_head, rounded_gradients, vocabulary, weight_gradient_dtype
from .operator import Operator, Parts


class BackwardArguments(NamedTuple):
    """The inputs and outputs of the forward, and the gradients by its outputs, flat; None where there is none."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    group: str  # ``head.HeadArguments``
    shard_sizes: list[int]
    actions: Tensor  # int64 [M]
    # ``Layout.row_args``
    mask: Tensor | None
    cu_seqlens: Tensor
    rows: Tensor | None
    # fp32 [M], from the forward
    top: Tensor
    log_total: Tensor
    entropy: Tensor | None
    logp: Tensor | None  # for a sampled gradient
    # fp32 [M]
    d_logp: Tensor | None
    d_lse: Tensor | None
    d_entropy: Tensor | None
    temperature: float
    softcap: float | None
    fp32_logits: bool
    workspace_bytes: int | None
    # as in ``fused_loss.Arguments``
    samples: int
    seed: Tensor | None
    need_hidden: bool
    need_weight: bool
    need_bias: bool


def _gradients(given: BackwardArguments) -> Gradients:
    """Recomputes the logits chunk by chunk, and from them the gradients of the head's inputs."""
    hidden = given.hidden
    index, _ = layout.valid_rows(given.mask, given.cu_seqlens, given.rows, given.actions.numel())

    def take(tensor: Tensor | None) -> Any:
        return layout.fp32_rows(tensor, index)

    taken = layout.take_rows(given.actions, index)
    assert taken is not None
    top, log_total = take(given.top), take(given.log_total)
    by_logp = torch.zeros_like(top) if given.d_logp is None else take(given.d_logp)
    # a token that there is not has no log-probability, and no gradient
    by_logp = by_logp.masked_fill((taken < 0) | (taken >= vocabulary(given)), torch.nan)
    by_lse = -by_logp if given.d_lse is None else take(given.d_lse) - by_logp
    head = make_head(given, weight_gradient_dtype(given, keep=False))
    with own_settings(hidden.device):
        gradients = logprobs_backward_pass(
            backend_for(hidden.device),
            Rows(layout.constant(hidden, head.weight.dtype), index, taken),
            head,
            Needs(given.need_hidden, given.need_weight, given.need_bias),
            Pull(top, log_total, by_logp, by_lse, take(given.d_entropy), take(given.entropy)),
            take(given.logp),
            sampling=None if given.seed is None else Sampling(given.samples, given.seed),
            workspace_bytes=given.workspace_bytes,
        )

    return rounded_gradients(gradients, given)


BACKWARD_PARTS = Parts(BackwardArguments, Gradients, _gradients, fake_gradients)
linear_logprobs_backward = Operator("klq_kernels::linear_logprobs_backward", BACKWARD_PARTS)


class Arguments(NamedTuple):
    """Flat tensors of M positions; ``layout.valid_rows`` finds the valid ones."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    group: str  # ``head.HeadArguments``
    shard_sizes: list[int]
    actions: Tensor  # int64 [M]
    # ``Layout.row_args``
    mask: Tensor | None
    cu_seqlens: Tensor
    rows: Tensor | None
    temperature: float
    softcap: float | None
    fp32_logits: bool
    return_entropy: bool
    workspace_bytes: int | None
    # as in ``fused_loss.Arguments``
    samples: int
    seed: Tensor | None


class Results(NamedTuple):
    """fp32 [M], 0 at masked positions; ``entropy`` is empty unless asked for.

    ``top`` and ``log_total`` are for backward: lse in the two parts of ``portable.row_stats``.
    """

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    top: Tensor
    log_total: Tensor


def _fake(given: Arguments) -> Results:
    logp = given.hidden.new_empty(given.actions.shape[0], dtype=torch.float32)
    entropy = torch.empty_like(logp) if given.return_entropy else logp.new_empty(0)
    return Results(logp, torch.empty_like(logp), entropy, torch.empty_like(logp), torch.empty_like(logp))


SETTINGS = ("group", "shard_sizes", "temperature", "softcap", "fp32_logits", "workspace_bytes", "samples")
SAVED = ("hidden", "weight", "bias", "actions", "mask", "cu_seqlens", "rows", "seed")


def _setup(ctx: Any, given: Arguments, found: Results) -> None:
    ctx.mark_non_differentiable(found.top, found.log_total)
    ctx.set_materialize_grads(False)
    logp = None if given.seed is None else found.logp
    ctx.save_for_backward(*(getattr(given, name) for name in SAVED), found.top, found.log_total, found.entropy, logp)
    ctx.settings = {name: getattr(given, name) for name in SETTINGS}
    ctx.return_entropy = given.return_entropy


def _backward(ctx: Any, by: Results, needs: dict[str, bool]) -> dict[str, Tensor | None]:
    *inputs, top, log_total, entropy, logp = ctx.saved_tensors
    if logp is not None and ctx.return_entropy and by.entropy is not None:
        raise RuntimeError(
            "linear_logprobs: a sampled gradient has no part by the entropy; detach it, or use gradient='dense'"
        )
    gradients = Gradients(
        *linear_logprobs_backward(
            *BackwardArguments(
                **dict(zip(SAVED, inputs, strict=True)),
                top=top,
                log_total=log_total,
                entropy=entropy if ctx.return_entropy else None,
                logp=logp,
                d_logp=by.logp,
                d_lse=by.lse,
                d_entropy=by.entropy if ctx.return_entropy else None,
                **ctx.settings,
                need_hidden=needs["hidden"],
                need_weight=needs["weight"],
                need_bias=needs["bias"],
            )
        )
    )
    return {name: getattr(gradients, f"d_{name}") for name in ("hidden", "weight", "bias") if needs[name]}


def _forward(given: Arguments) -> Results:
    """Log-probability, log-normaliser and entropy of each position's token."""
    positions = given.actions.numel()
    index, _ = layout.valid_rows(given.mask, given.cu_seqlens, given.rows, positions)
    taken = layout.take_rows(given.actions, index)
    assert taken is not None
    layout.check_actions(taken, vocabulary(given))
    head = make_head(given, torch.float32)
    with own_settings(given.hidden.device):
        found = logprobs_pass(
            backend_for(given.hidden.device),
            Rows(layout.constant(given.hidden, head.weight.dtype), index, taken),
            head,
            entropy=given.return_entropy,
            workspace_bytes=given.workspace_bytes,
        )

    def put(vector: Tensor | None) -> Tensor:
        return found.logp.new_empty(0) if vector is None else layout.put_rows(vector, index, positions)

    lse = torch.add(found.log_total, found.top, alpha=head.scale)
    return Results(put(found.logp), put(lse), put(found.entropy), put(found.top), put(found.log_total))


PARTS = Parts(Arguments, Results, _forward, _fake, _setup, _backward)
linear_logprobs = Operator("klq_kernels::linear_logprobs", PARTS)
