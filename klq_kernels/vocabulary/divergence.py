"""The divergence of two heads, token by token, and its gradient: nothing of size [tokens, vocab] kept.

    for chunk of rows:
        logits, ref_logits = hidden[chunk] @ W.T, ref_hidden[chunk] @ W_ref.T      a product each
        normalisers and divergence of each row                                     row_kl

    for chunk of rows, in backward:
        logits, ref_logits                                                         again
        logits <- gradient by the logits                                           row_kl_grad
        d_hidden[chunk] = logits @ W                                               GEMM 2
        d_weight += logits.T @ hidden[chunk]                                       GEMM 3, fp32

Six products in all, of which backward has four. The reference is a constant: of its head there is the first product
alone. Logits are stored token by token (``token_major``) whatever the backend, in two buffers.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import NOTHING, Divergence, Head, Needs, Pair, States, part, slices
from .token_major import Logits


class Side(NamedTuple):
    """The policy or the reference: its head, and the hidden states that it takes."""

    states: States
    head: Head


def divergence_pass(
    backend: ModuleType, policy: Side, reference: Side, *, reverse: bool, workspace_bytes: int | None
) -> Divergence:
    """The first of the loops above. ``workspace_bytes``: for the policy's logits; the reference has as many rows."""
    ours, theirs = _logits(backend, policy, reference, NOTHING, workspace_bytes)
    n, device = policy.states.n, policy.states.hidden.device
    found = Divergence(*(torch.empty(n, dtype=torch.float32, device=device) for _ in Divergence._fields))
    for chunk in slices(n, ours.chunk_rows):
        logits, ref_logits = ours.project(chunk), theirs.project(chunk)
        backend.row_kl(logits, ref_logits, part(found, chunk), pair=_pair(policy.head, reference.head, reverse))
    return found


def divergence_backward_pass(
    backend: ModuleType,
    policy: Side,
    reference: Side,
    needs: Needs,
    found: Divergence,
    d_kl: Tensor,
    *,
    reverse: bool,
    workspace_bytes: int | None,
) -> Logits:
    """The second: the policy's logits, with the gradients that are needed."""
    ours, theirs = _logits(backend, policy, reference, needs, workspace_bytes)
    for chunk in slices(policy.states.n, ours.chunk_rows):
        logits, ref_logits = ours.project(chunk), theirs.project(chunk)
        dlogits = ours.gradient
        backend.row_kl_grad(
            logits, ref_logits, part(found, chunk), d_kl[chunk], dlogits,
            pair=_pair(policy.head, reference.head, reverse),
        )  # fmt: skip
        if ours.bias is not None:
            ours.bias += dlogits.sum(0, dtype=torch.float32)
        ours.multiply(chunk, dlogits)
    return ours


def _logits(
    backend: ModuleType, policy: Side, reference: Side, needs: Needs, workspace_bytes: int | None
) -> tuple[Logits, Logits]:
    """Two buffers of as many rows."""
    ours = Logits(backend, *policy, needs, workspace_bytes=workspace_bytes)
    theirs = Logits(backend, *reference, NOTHING, workspace_bytes=None, chunk_rows=ours.chunk_rows)
    return ours, theirs


def _pair(policy: Head, reference: Head, reverse: bool) -> Pair:
    return Pair(policy.scale, policy.softcap, reference.scale, reference.softcap, reverse)
