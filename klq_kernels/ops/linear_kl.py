"""klq_kernels::linear_kl: the divergence of two linear heads at each position, over the whole vocabulary.

As in ``linear_logprobs``, forward keeps a few numbers per row and backward recomputes each chunk of logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import backend_for
from ..call import layout
from ..vocabulary import chunking
from ..vocabulary.chunks import Divergence, Needs, States
from ..vocabulary.divergence import Side, divergence_backward_pass, divergence_pass
from ..vocabulary.precision import own_settings
from .head import Gradients, fake_gradients, head_dtypes, make_head, rounded_gradients
from .operator import Operator, Parts


class BackwardArguments(NamedTuple):
    """The inputs and outputs of the forward, and the gradient by the divergence, flat."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    ref_hidden: Tensor  # [M, H of the reference]
    ref_weight: Tensor
    ref_bias: Tensor | None
    # ``Layout.row_args``
    mask: Tensor | None
    cu_seqlens: Tensor
    rows: Tensor | None
    # fp32 [M], from the forward
    kl: Tensor
    top: Tensor
    log_total: Tensor
    ref_top: Tensor
    ref_log_total: Tensor
    d_kl: Tensor  # [M]
    temperature: float
    softcap: float | None
    ref_temperature: float
    ref_softcap: float | None
    fp32_logits: bool
    reverse: bool
    workspace_bytes: int | None
    need_hidden: bool
    need_weight: bool
    need_bias: bool


class Arguments(NamedTuple):
    """Flat tensors of M positions; ``layout.valid_rows`` finds the valid ones."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    ref_hidden: Tensor  # [M, H of the reference]
    ref_weight: Tensor
    ref_bias: Tensor | None
    # ``Layout.row_args``
    mask: Tensor | None
    cu_seqlens: Tensor
    rows: Tensor | None
    temperature: float
    softcap: float | None
    ref_temperature: float
    ref_softcap: float | None
    fp32_logits: bool
    reverse: bool
    workspace_bytes: int | None


class Results(NamedTuple):
    """fp32 [M], 0 at masked positions; all but ``kl`` are for backward (``chunks.Divergence``)."""

    kl: Tensor
    top: Tensor
    log_total: Tensor
    ref_top: Tensor
    ref_log_total: Tensor


class _OneHead(NamedTuple):
    """``head.HeadArguments`` of the policy or of the reference, which is whole on this process."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    fp32_logits: bool
    workspace_bytes: int | None
    group: str
    shard_sizes: list[int]
    samples: int


def _heads(given: Arguments | BackwardArguments) -> tuple[_OneHead, _OneHead]:
    """Policy and reference, each with its part of the workspace: as many rows of logits."""

    def head(prefix: str) -> _OneHead:
        named = {name: getattr(given, prefix + name) for name in ("hidden", "weight", "bias", "temperature", "softcap")}
        return _OneHead(
            **named, fp32_logits=given.fp32_logits, workspace_bytes=None, group="", shard_sizes=[], samples=0
        )

    heads = head(""), head("ref_")
    if given.workspace_bytes is None:
        return heads
    sizes = [head_dtypes(one).logits.itemsize for one in heads]
    policy, reference = (given.workspace_bytes * size // sum(sizes) for size in sizes)
    return heads[0]._replace(workspace_bytes=policy), heads[1]._replace(workspace_bytes=reference)


def _side(given: _OneHead, index: Tensor | None, gradient_dtype: torch.dtype) -> Side:
    head = make_head(given, gradient_dtype)
    return Side(States(layout.constant(given.hidden, head.weight.dtype), index), head)


def _weight_gradient_dtype(policy: _OneHead) -> torch.dtype:
    """``chunking.weight_gradient_dtype`` of the policy's head."""
    positions, (vocab, width) = policy.hidden.shape[0], policy.weight.shape
    return chunking.weight_gradient_dtype(
        positions, vocab, width, head_dtypes(policy), policy.weight.dtype, policy.hidden.device,
        policy.workspace_bytes, vocabulary_major=False, keep=False,
    )  # fmt: skip


def _gradients(given: BackwardArguments) -> Gradients:
    """Recomputes the logits chunk by chunk, and from them the gradients of the policy's head and hidden states."""
    hidden = given.hidden
    index, _ = layout.valid_rows(given.mask, given.cu_seqlens, given.rows, hidden.shape[0])

    def take(tensor: Tensor) -> Tensor:
        taken = layout.fp32_rows(tensor, index)
        assert taken is not None
        return taken

    policy, reference = _heads(given)
    with own_settings(hidden.device):
        found = divergence_backward_pass(
            backend_for(hidden.device),
            _side(policy, index, _weight_gradient_dtype(policy)),
            _side(reference, index, torch.float32),
            Needs(given.need_hidden, given.need_weight, given.need_bias),
            Divergence(*(take(getattr(given, name)) for name in Divergence._fields)),
            take(given.d_kl),
            reverse=given.reverse,
            workspace_bytes=policy.workspace_bytes,
        )

    return rounded_gradients(found, given)


BACKWARD_PARTS = Parts(BackwardArguments, Gradients, _gradients, fake_gradients)
linear_kl_backward = Operator("klq_kernels::linear_kl_backward", BACKWARD_PARTS)


def _forward(given: Arguments) -> Results:
    """The divergence at each position."""
    positions = given.hidden.shape[0]
    index, _ = layout.valid_rows(given.mask, given.cu_seqlens, given.rows, positions)
    policy, reference = _heads(given)
    with own_settings(given.hidden.device):
        found = divergence_pass(
            backend_for(given.hidden.device),
            _side(policy, index, torch.float32),
            _side(reference, index, torch.float32),
            reverse=given.reverse,
            workspace_bytes=policy.workspace_bytes,
        )
    return Results(*(layout.put_rows(getattr(found, name), index, positions) for name in Results._fields))


def _fake(given: Arguments) -> Results:
    kl = given.hidden.new_empty(given.hidden.shape[0], dtype=torch.float32)
    return Results(kl, *(torch.empty_like(kl) for _ in Results._fields[1:]))


SETTINGS = (
    "temperature", "softcap", "ref_temperature", "ref_softcap", "fp32_logits", "reverse", "workspace_bytes"
)  # fmt: skip
SAVED = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias", "mask", "cu_seqlens", "rows")


def _setup(ctx: Any, given: Arguments, found: Results) -> None:
    ctx.mark_non_differentiable(*found[1:])
    ctx.save_for_backward(*(getattr(given, name) for name in SAVED), *found)
    ctx.settings = {name: getattr(given, name) for name in SETTINGS}


def _backward(ctx: Any, by: Results, needs: dict[str, bool]) -> dict[str, Tensor | None]:
    saved = dict(zip((*SAVED, *Results._fields), ctx.saved_tensors, strict=True))
    gradients = Gradients(
        *linear_kl_backward(
            *BackwardArguments(
                **saved,
                d_kl=by.kl,
                **ctx.settings,
                need_hidden=needs["hidden"],
                need_weight=needs["weight"],
                need_bias=needs["bias"],
            )
        )
    )
    return {name: getattr(gradients, f"d_{name}") for name in ("hidden", "weight", "bias") if needs[name]}


PARTS = Parts(Arguments, Results, _forward, _fake, _setup, _backward)
linear_kl = Operator("klq_kernels::linear_kl", PARTS)
