"""The one-pass algorithm: three matrix products over the vocabulary, nothing of size [tokens, vocab] kept.

    for chunk of rows, last to first:
        logits = hidden[chunk] @ W.T                       GEMM 1
        normaliser, logp (, entropy) of each row           statistics
        A (reverse scan with a carry), loss, dlogp, dV     lambda_errors, klq_residual: a few numbers per row
        logits <- dlogp (onehot(action) - softmax)         gradients
        d_hidden[chunk] = logits @ W                       GEMM 2
        d_weight += logits.T @ hidden[chunk]               GEMM 3, fp32

A token's gradient needs its lambda-error, and that needs only tokens after it. So the chunks are walked in reverse time
and one scalar is carried over the boundary; the gradient is exact and is ready when the loss is. With rollout targets
A is given and the same loop runs without the scan. Each product is left out where nobody needs its result.

fp16 gradients are computed for a loss scaled by the power of two nearest above ``denom`` and scaled back exactly in
backward, so that those of a mean over many thousand tokens do not underflow on the way.

The loop is written once, over the operations of a backend (``portable`` documents them). Its lines on the vocabulary
exist in two forms, by how a chunk of logits is stored: ``token_major`` and ``vocabulary_major``.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import Head, Needs, Rows, VocabularyWork, slices
from .token_major import TokenMajor
from .vocabulary_major import VocabularyMajor

NOTHING = Needs(hidden=False, weight=False, bias=False)


class ScanInputs(NamedTuple):
    """What the on-policy pass needs to form the lambda-errors itself; fp32 rows."""

    ref_logp: Tensor
    rewards: Tensor | None
    trace: Tensor | None
    tail: Tensor  # fp32 [B]
    cu_seqlens: Tensor  # int32 [B + 1], in rows
    gamma: float
    lam: float


class Targets(NamedTuple):
    """Rollout targets; fp32 rows."""

    old_logp: Tensor
    old_values: Tensor
    advantages: Tensor


class LossShape(NamedTuple):
    """The hyperparameters of ``reference.klq_residual_loss``."""

    tau: float
    alpha: float
    loss_type: str
    huber_delta: float
    value_clip: float
    log_ratio_clip: float


class PassResult(NamedTuple):
    """Per-row vectors (fp32 [n]) and the head's gradients at the gradient scale (None where not needed)."""

    logp: Tensor
    entropy: Tensor | None
    advantages: Tensor
    losses: Tensor
    d_values: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None


def _vocabulary_work(
    backend: ModuleType, rows: Rows, head: Head, needs: Needs, *, keep: bool, workspace_bytes: int | None
) -> VocabularyWork:
    """Products and row operations in the form that suits the backend."""
    form = VocabularyMajor if backend.VOCABULARY_MAJOR else TokenMajor
    return form(backend, rows, head, needs, keep=keep, workspace_bytes=workspace_bytes)


def _part(vector: Tensor | None, chunk: slice) -> Tensor | None:
    """A chunk of a per-row vector that may be absent."""
    return None if vector is None else vector[chunk]


def logprobs_pass(
    backend: ModuleType, rows: Rows, head: Head, *, entropy: bool, workspace_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logp, top, log_total, entropy) of every row, fp32 [n] (``portable.row_stats``): GEMM 1 and the statistics."""
    n = rows.actions.numel()
    logp, top, log_total = (torch.empty(n, dtype=torch.float32, device=rows.actions.device) for _ in range(3))
    entropies = torch.empty_like(logp) if entropy else None
    work = _vocabulary_work(backend, rows, head, NOTHING, keep=False, workspace_bytes=workspace_bytes)
    for chunk in reversed(slices(n, work.chunk_rows)):
        work.statistics(chunk, top[chunk], log_total[chunk], logp[chunk], _part(entropies, chunk))
    return logp, top, log_total, entropies


def logprobs_backward_pass(
    backend: ModuleType,
    rows: Rows,
    head: Head,
    needs: Needs,
    top: Tensor,
    log_total: Tensor,
    entropy: Tensor | None,
    d_logp: Tensor,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    *,
    workspace_bytes: int | None,
) -> VocabularyWork:
    """Gradients of the head from those of its per-row outputs: recomputes each chunk of logits, then GEMM 2 and 3."""
    n = rows.actions.numel()
    d_softmax = -d_logp if d_lse is None else d_lse - d_logp
    work = _vocabulary_work(backend, rows, head, needs, keep=False, workspace_bytes=workspace_bytes)
    for chunk in reversed(slices(n, work.chunk_rows)):
        work.gradients(
            chunk, top[chunk], log_total[chunk], d_logp[chunk], d_softmax[chunk], _part(d_entropy, chunk),
            _part(entropy, chunk),
        )  # fmt: skip
    return work


def klq_pass(
    backend: ModuleType,
    rows: Rows,
    head: Head,
    needs: Needs,
    values: Tensor,
    targets: Targets | None,
    scan: ScanInputs | None,
    weights: Tensor | None,
    shape: LossShape,
    *,
    grad_scale: Tensor,
    entropy: bool,
    workspace_bytes: int | None,
) -> PassResult:
    """The loop at the top of this file. Exactly one of ``targets`` and ``scan`` is given."""
    n = rows.actions.numel()
    device = rows.actions.device
    logp, top, log_total, losses, d_logp, d_values = (
        torch.empty(n, dtype=torch.float32, device=device) for _ in range(6)
    )
    entropies = torch.empty_like(logp) if entropy else None
    advantages = torch.empty_like(logp) if targets is None else targets.advantages
    carry = torch.zeros(1, dtype=torch.float32, device=device)
    work = _vocabulary_work(backend, rows, head, needs, keep=any(needs), workspace_bytes=workspace_bytes)
    for chunk in reversed(slices(n, work.chunk_rows)):
        work.statistics(chunk, top[chunk], log_total[chunk], logp[chunk], _part(entropies, chunk))
        if scan is not None:
            backend.lambda_errors(
                logp[chunk], scan.ref_logp[chunk], values[chunk], _part(scan.rewards, chunk), _part(scan.trace, chunk),
                scan.tail, None, scan.cu_seqlens, advantages[chunk],
                tau=shape.tau, gamma=scan.gamma, lam=scan.lam, first_row=chunk.start, carry=carry,
            )  # fmt: skip
        backend.klq_residual(
            logp[chunk], values[chunk],
            None if targets is None else targets.old_logp[chunk],
            None if targets is None else targets.old_values[chunk],
            advantages[chunk], _part(weights, chunk),
            losses[chunk], d_logp[chunk], d_values[chunk],
            grad_scale=grad_scale, **shape._asdict(),
        )  # fmt: skip
        if any(needs):
            work.gradients(chunk, top[chunk], log_total[chunk], d_logp[chunk], -d_logp[chunk], None, None)
    return PassResult(logp, entropies, advantages, losses, d_values, work.hidden, work.weight, work.bias)
