"""The one-pass algorithm: three matrix products over the vocabulary, nothing of size [tokens, vocab] kept.

    for chunk of rows, last to first:
        logits = hidden[chunk] @ W.T                       GEMM 1
        lse, logp (, entropy) of each row                  row_stats
        A (reverse scan with a carry), loss, dlogp, dV     lambda_errors, klq_residual: a few numbers per row
        logits <- dlogp (onehot(action) - softmax)         row_grad_, in place
        d_hidden[chunk] = logits @ W                       GEMM 2
        d_weight += logits.T @ hidden[chunk]               GEMM 3, fp32

A token's gradient needs its lambda-error, and that needs only tokens after it. So the chunks are walked in reverse time
and one scalar is carried over the boundary; the gradient is exact and is ready when the loss is. With rollout targets
A is given and the same loop runs without the scan. Each product is left out where nobody needs its result.

Gradients are computed for a loss scaled by the power of two nearest above ``denom`` and scaled back exactly in
backward. So fp16 gradients of a mean over many thousand tokens do not underflow on the way, and bf16 ones round once.

The loop is written once, over the row operations of a backend (``portable`` documents the five of them).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import planner, products


class Head(NamedTuple):
    """The linear head: z = softcap(hidden @ weight.T + bias) * scale, with scale = 1 / temperature."""

    weight: Tensor  # [V, H], in the dtype of the products
    bias: Tensor | None  # [V], likewise
    scale: float
    softcap: float | None
    gradient_dtype: torch.dtype  # what the weight's gradient adds up in (``planner.weight_gradient_dtype``)


class Rows(NamedTuple):
    """The valid rows of a call: where they lie, what was taken there, and how many there are."""

    hidden: Tensor  # [M, H], the caller's
    positions: Tensor | None  # int64 [n] into hidden, None for all
    actions: Tensor  # int64 [n]

    def take(self, chunk: slice) -> Tensor:
        return self.hidden[chunk] if self.positions is None else self.hidden.index_select(0, self.positions[chunk])


class Needs(NamedTuple):
    """Which gradients somebody will read."""

    hidden: bool
    weight: bool
    bias: bool


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


def chunks_last_to_first(n: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` rows that cover n rows, the last rows first."""
    for start in reversed(range(0, n, max(size, 1))):
        yield slice(start, min(start + size, n))


class Logits:
    """One reusable buffer of logits, rows at 16-byte multiples, filled by GEMM 1."""

    def __init__(self, n: int, head: Head, workspace_bytes: int | None) -> None:
        vocab = head.weight.shape[0]
        self.rows = planner.chunk_rows(n, vocab, head.weight.dtype, head.weight.device, workspace_bytes)
        self._head = head
        self._buffer = head.weight.new_empty(self.rows, planner.row_stride(vocab))[:, :vocab]

    def project(self, hidden: Tensor) -> Tensor:
        """Raw logits of these rows (before softcap and temperature), valid until the next call."""
        return products.project(hidden, self._head.weight, self._head.bias, self._buffer[: hidden.shape[0]])


class HeadGradients:
    """Sums a linear head's gradients over chunks of dlogits.

    ``weight`` adds up in ``head.gradient_dtype`` and ``bias`` in fp32; ``hidden`` gets each row once, at the caller's
    position, and is 0 elsewhere.
    """

    def __init__(self, rows: Rows, head: Head, needs: Needs) -> None:
        self._rows, self._head = rows, head
        vocab, width = head.weight.shape
        device = head.weight.device
        rowless = rows.actions.numel() == 0
        make = torch.zeros if rowless or rows.positions is not None else torch.empty
        self.hidden = make(rows.hidden.shape, dtype=head.weight.dtype, device=device) if needs.hidden else None
        make = torch.zeros if rowless else torch.empty
        self.weight = make(vocab, width, dtype=head.gradient_dtype, device=device) if needs.weight else None
        self.bias = torch.zeros(vocab, dtype=torch.float32, device=device) if needs.bias else None
        self._first = True

    def add(self, chunk: slice, hidden: Tensor, dlogits: Tensor) -> None:
        positions = self._rows.positions
        if self.hidden is not None:
            product = products.project_back(dlogits, self._head.weight)
            if positions is None:
                self.hidden[chunk] = product
            else:
                self.hidden.index_copy_(0, positions[chunk], product)
        if self.weight is not None:
            products.accumulate(self.weight, dlogits, hidden, first=self._first)
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=torch.float32)
        self._first = False


def logprobs_pass(
    backend: ModuleType, rows: Rows, head: Head, *, entropy: bool, workspace_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy) of every row, fp32 [n]: GEMM 1 and row_stats per chunk."""
    n = rows.actions.numel()
    logp, lse = (torch.empty(n, dtype=torch.float32, device=rows.actions.device) for _ in range(2))
    entropies = torch.empty_like(logp) if entropy else None
    buffer = Logits(n, head, workspace_bytes)
    for chunk in chunks_last_to_first(n, buffer.rows):
        logits = buffer.project(rows.take(chunk))
        backend.row_stats(
            logits, rows.actions[chunk], lse[chunk], logp[chunk], None if entropies is None else entropies[chunk],
            scale=head.scale, softcap=head.softcap,
        )  # fmt: skip
    return logp, lse, entropies


def logprobs_backward_pass(
    backend: ModuleType,
    rows: Rows,
    head: Head,
    needs: Needs,
    lse: Tensor,
    entropy: Tensor | None,
    d_logp: Tensor,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    *,
    workspace_bytes: int | None,
) -> HeadGradients:
    """Gradients of the head from those of its per-row outputs: recomputes each chunk of logits, then GEMM 2 and 3."""
    n = rows.actions.numel()
    gradients = HeadGradients(rows, head, needs)
    d_softmax = -d_logp if d_lse is None else d_lse - d_logp
    buffer = Logits(n, head, workspace_bytes)
    for chunk in chunks_last_to_first(n, buffer.rows):
        hidden = rows.take(chunk)
        logits = buffer.project(hidden)
        backend.row_grad_(
            logits, rows.actions[chunk], lse[chunk], d_logp[chunk], d_softmax[chunk],
            None if d_entropy is None else d_entropy[chunk], None if entropy is None else entropy[chunk],
            scale=head.scale, softcap=head.softcap,
        )  # fmt: skip
        gradients.add(chunk, hidden, logits)
    return gradients


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
    logp, lse, losses, d_logp, d_values = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(5))
    entropies = torch.empty_like(logp) if entropy else None
    advantages = torch.empty_like(logp) if targets is None else targets.advantages
    carry = torch.zeros(1, dtype=torch.float32, device=device)
    gradients = HeadGradients(rows, head, needs)
    buffer = Logits(n, head, workspace_bytes)
    for chunk in chunks_last_to_first(n, buffer.rows):
        hidden = rows.take(chunk)
        actions = rows.actions[chunk]
        logits = buffer.project(hidden)
        backend.row_stats(
            logits, actions, lse[chunk], logp[chunk], None if entropies is None else entropies[chunk],
            scale=head.scale, softcap=head.softcap,
        )  # fmt: skip
        if scan is not None:
            backend.lambda_errors(
                logp[chunk], scan.ref_logp[chunk], values[chunk],
                None if scan.rewards is None else scan.rewards[chunk],
                None if scan.trace is None else scan.trace[chunk],
                scan.tail, None, scan.cu_seqlens, advantages[chunk],
                tau=shape.tau, gamma=scan.gamma, lam=scan.lam, first_row=chunk.start, carry=carry,
            )  # fmt: skip
        backend.klq_residual(
            logp[chunk], values[chunk],
            None if targets is None else targets.old_logp[chunk],
            None if targets is None else targets.old_values[chunk],
            advantages[chunk], None if weights is None else weights[chunk],
            losses[chunk], d_logp[chunk], d_values[chunk],
            grad_scale=grad_scale, **shape._asdict(),
        )  # fmt: skip
        if any(needs):
            backend.row_grad_(
                logits, actions, lse[chunk], d_logp[chunk], -d_logp[chunk], None, None,
                scale=head.scale, softcap=head.softcap,
            )  # fmt: skip
            gradients.add(chunk, hidden, logits)
    return PassResult(logp, entropies, advantages, losses, d_values, gradients.hidden, gradients.weight, gradients.bias)
