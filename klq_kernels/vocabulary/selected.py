"""The logits of k ids per token, and their gradient: no product with the whole head, nothing of size [tokens, vocab].

Id v owns the rows v A .. v A + A - 1 of the head, A of them being its atoms. A pair (t, j) is token t and its j-th id.

    c[t, j] = hidden[t] . W[row(t, j)] + bias[row(t, j)]                     selected_logits: a dot product each
    logits = softcap(c) / temperature,    slope = the soft cap's at c

    g = gradient by c = gradient by the logits * slope / temperature
    d_hidden[t] = sum of g[t, j] W[row(t, j)] over j                         weighted_sums: entries by token
    d_weight[r] = sum of g[t, j] hidden[t] over the pairs with this row      weighted_sums: entries by row

All sums are fp32. The pairs of a row come in the order of the tokens, by a stable sort of the ids, so that ids which
occur more than once give the same bits on every run. These are the sums of the sampled gradient
(``sampling``), with the caller's entries in place of sampled ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .chunks import Chosen, Needs, Sums


@dataclass
class Found:
    """A head's gradients; those that are not needed are None."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def selected_logits(
    backend: ModuleType, chosen: Chosen, weight: Tensor, bias: Tensor | None, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """(logits, slope), fp32 [n, k, A]: NaN for an id outside 0 .. V - 1; no slope without a soft cap."""
    n, k = chosen.ids.shape
    logits = torch.empty(n, k, chosen.atoms, dtype=torch.float32, device=weight.device)
    slope = None if softcap is None else torch.empty_like(logits)
    if logits.numel():
        backend.selected_logits(chosen, weight, bias, logits, slope, scale=scale, softcap=softcap)
    return logits, slope


def selected_gradients(
    backend: ModuleType,
    chosen: Chosen,
    weight: Tensor,
    needs: Needs,
    d_logits: Tensor,
    slope: Tensor | None,
    *,
    scale: float,
) -> Found:
    """The gradients of (hidden, weight, bias), the first two in their dtypes and rounded once, the last in fp32.

    Args:
        d_logits: fp32 [n, k, A]. An id outside 0 .. V - 1 makes the gradient of its token NaN, and that of the nearest
            id.
        slope: what ``selected_logits`` found.
    """
    known = chosen.ids.clamp(0, weight.shape[0] // chosen.atoms - 1)
    pull = d_logits * scale
    if slope is not None:
        pull *= slope
    pull = pull.masked_fill((known != chosen.ids)[..., None], torch.nan)
    chosen = chosen._replace(ids=known)
    hidden = _hidden_gradient(backend, chosen, weight, pull) if needs.hidden else None
    by_weight = by_bias = None
    if needs.weight or needs.bias:
        sums = _by_row(chosen, weight.shape[0], pull)
        if needs.bias:
            ones = pull.new_ones(chosen.states.n, 1)
            by_bias = _sums(backend, sums, ones, weight.shape[0], torch.float32).squeeze(1)
        if needs.weight:
            states, positions = chosen.states
            places = sums.places if positions is None else positions[sums.places].int()
            by_weight = _sums(backend, sums._replace(places=places), states, weight.shape[0], weight.dtype)
    return Found(hidden, by_weight, by_bias)


def _hidden_gradient(backend: ModuleType, chosen: Chosen, weight: Tensor, pull: Tensor) -> Tensor:
    """[M, H], 0 outside of the valid rows."""
    states, per_row = chosen.states, pull[0].numel() if len(pull) else 0
    ends = torch.arange(states.n + 1, device=pull.device) * per_row
    atoms = torch.arange(chosen.atoms, device=pull.device)
    rows = (chosen.ids[..., None] * chosen.atoms + atoms).int().flatten()
    sums = Sums(ends[:-1].contiguous(), ends[1:].contiguous(), rows, pull.flatten())
    by_row = _sums(backend, sums, weight, states.n, states.hidden.dtype)
    if states.positions is None:
        return by_row
    total = states.hidden.new_zeros(states.hidden.shape)
    states.put(total, slice(0, states.n), by_row)
    return total


def _by_row(chosen: Chosen, rows: int, pull: Tensor) -> Sums:
    """The sum over the pairs of each row of the head; ``places`` holds tokens.

    Pairs are sorted by id, once for all atoms: the entries of atom a follow those of atom a - 1.
    """
    n, k = chosen.ids.shape
    ids, order = torch.sort(chosen.ids.flatten(), stable=True)
    bounds = torch.searchsorted(ids, torch.arange(rows // chosen.atoms + 1, device=ids.device))
    firsts = torch.arange(chosen.atoms, device=ids.device) * (n * k)
    begins, ends = ((bound[:, None] + firsts).flatten() for bound in (bounds[:-1], bounds[1:]))
    tokens = (order // max(k, 1)).int().repeat(chosen.atoms)
    return Sums(begins, ends, tokens, pull.reshape(n * k, chosen.atoms)[order].T.flatten())


def _sums(backend: ModuleType, sums: Sums, source: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, the width of ``source``], in ``dtype``."""
    make = torch.empty if sums.values.numel() else torch.zeros
    out = make(rows, source.shape[1], dtype=dtype, device=source.device)
    if sums.values.numel():
        backend.weighted_sums(sums, source, out)
    return out
