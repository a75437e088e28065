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
A is given and the same loop runs without the scan; a backend may then do all that lies between GEMM 1 and GEMM 2 at
once (``VocabularyWork.update``). A product whose result is not needed is left out.

With a sampled gradient GEMM 2 and 3 are sums of a few rows each, after the last chunk (``sampling``). Where processes
share a head, the loop runs on all of them, each with its own rows of W (``sharded``).

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

from .chunks import (
    NOTHING,
    Head,
    LossShape,
    Needs,
    Pull,
    Residuals,
    Rows,
    ScanTerms,
    Statistics,
    Terms,
    VocabularyForm,
    VocabularyWork,
    part,
    slices,
)
from .sampling import Sampled, Sampling
from .sharded import Sharded
from .token_major import TokenMajor
from .vocabulary_major import VocabularyMajor


class ScanInputs(NamedTuple):
    """The further inputs of the on-policy pass, which forms the lambda-errors itself; fp32 rows."""

    terms: ScanTerms  # with the logp and values of the pass's own terms
    tail: Tensor  # fp32 [B]
    cu_seqlens: Tensor  # int32 [B + 1], in rows
    gamma: float
    lam: float


class PassResult(NamedTuple):
    """Per-row vectors (fp32 [n]) and the head's gradients at the gradient scale (None where not needed)."""

    entropy: Tensor | None
    losses: Tensor
    d_values: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None
    entries_per_token: Tensor | None  # fp32, 0-d: the mean, where the gradient is sampled


def _vocabulary_work(
    backend: ModuleType, rows: Rows, head: Head, needs: Needs, *, keep: bool, workspace_bytes: int | None
) -> VocabularyWork:
    """Products and row operations in the form that suits the backend."""
    form = _form(backend)

    def local(rows: Rows, head: Head) -> VocabularyWork:
        return form(backend, rows, head, needs, keep=keep, workspace_bytes=workspace_bytes)

    return local(rows, head) if head.shard is None else Sharded(local, rows, head, needs, sampled=False)


def _gradient_work(
    backend: ModuleType,
    rows: Rows,
    head: Head,
    needs: Needs,
    sampling: Sampling | None,
    logp: Tensor,
    *,
    keep: bool,
    workspace_bytes: int | None,
) -> VocabularyWork:
    """The same, or with a sampled gradient."""
    if sampling is None or not any(needs):
        return _vocabulary_work(backend, rows, head, needs, keep=keep, workspace_bytes=workspace_bytes)
    form = _form(backend)

    def local(rows: Rows, head: Head) -> VocabularyWork:
        return Sampled(form, backend, rows, head, needs, sampling, logp, keep=keep, workspace_bytes=workspace_bytes)

    return local(rows, head) if head.shard is None else Sharded(local, rows, head, needs, sampled=True)


def _form(backend: ModuleType) -> type[VocabularyForm]:
    return VocabularyMajor if backend.VOCABULARY_MAJOR else TokenMajor


def _empty_statistics(logp: Tensor, *, entropy: bool) -> Statistics:
    """Room for the statistics of every row, log-probabilities going to ``logp``."""
    top, log_total = torch.empty_like(logp), torch.empty_like(logp)
    return Statistics(top, log_total, logp, torch.empty_like(logp) if entropy else None)


def logprobs_pass(
    backend: ModuleType, rows: Rows, head: Head, *, entropy: bool, workspace_bytes: int | None
) -> Statistics:
    """The statistics of every row: GEMM 1 alone."""
    n = rows.actions.numel()
    logp = torch.empty(n, dtype=torch.float32, device=rows.actions.device)
    found = _empty_statistics(logp, entropy=entropy)
    work = _vocabulary_work(backend, rows, head, NOTHING, keep=False, workspace_bytes=workspace_bytes)
    for chunk in reversed(slices(n, work.chunk_rows)):
        work.statistics(chunk, part(found, chunk))
    return found


def logprobs_backward_pass(
    backend: ModuleType,
    rows: Rows,
    head: Head,
    needs: Needs,
    pull: Pull,
    logp: Tensor,
    *,
    sampling: Sampling | None,
    workspace_bytes: int | None,
) -> VocabularyWork:
    """Gradients of the head from those of its per-row outputs: recomputes each chunk of logits, then GEMM 2 and 3."""
    work = _gradient_work(backend, rows, head, needs, sampling, logp, keep=False, workspace_bytes=workspace_bytes)
    for chunk in reversed(slices(rows.actions.numel(), work.chunk_rows)):
        work.gradients(chunk, part(pull, chunk))
    work.finish()
    return work


def klq_pass(
    backend: ModuleType,
    rows: Rows,
    head: Head,
    needs: Needs,
    terms: Terms,
    scan: ScanInputs | None,
    shape: LossShape,
    *,
    grad_scale: Tensor,
    entropy: bool,
    sampling: Sampling | None,
    workspace_bytes: int | None,
) -> PassResult:
    """The loop at the top of this file. Writes ``terms.logp`` and, with ``scan``, ``terms.advantages``."""
    found = _empty_statistics(terms.logp, entropy=entropy)
    residuals = Residuals(*(torch.empty_like(terms.logp) for _ in range(3)))
    carry = terms.logp.new_zeros(1)
    work = _gradient_work(
        backend, rows, head, needs, sampling, terms.logp, keep=any(needs), workspace_bytes=workspace_bytes
    )
    for chunk in reversed(slices(rows.actions.numel(), work.chunk_rows)):
        rows_found, rows_terms, rows_loss = part(found, chunk), part(terms, chunk), part(residuals, chunk)
        given = scan is None and any(needs)  # targets, so that the rows need not wait for each other
        if given and work.update(chunk, rows_found, rows_terms, rows_loss, grad_scale=grad_scale, shape=shape):
            continue
        work.statistics(chunk, rows_found)
        if scan is not None:
            backend.lambda_errors(
                part(scan.terms, chunk), scan.tail, None, scan.cu_seqlens, rows_terms.advantages,
                tau=shape.tau, gamma=scan.gamma, lam=scan.lam, first_row=chunk.start, carry=carry,
            )  # fmt: skip
        backend.klq_residual(rows_terms, rows_loss, grad_scale=grad_scale, shape=shape)
        if any(needs):
            d_logp = rows_loss.d_logp
            work.gradients(chunk, Pull(rows_found.top, rows_found.log_total, d_logp, -d_logp))
    work.finish()
    return PassResult(
        found.entropy, residuals.losses, residuals.d_values, work.hidden, work.weight, work.bias, work.entries_per_token
    )
