"""``linear_select``: the logits of a few ids per token, straight from hidden states, without all the others."""

from __future__ import annotations

import torch
from torch import Tensor

from .call.checks import require, require_alike, require_tensor
from .call.head import check_linear, check_whole
from .call.layout import Packing, layout_of_any
from .call.transforms import refuse_tangents
from .ops import linear_select as operator


def linear_select(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    atoms: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """z[ids] with z = softcap(hidden @ weight.T + bias) / temperature, differentiable in hidden, weight and bias.

    Each token takes k rows of the head, and no logit that was not asked for is computed: k dot products a token, and
    as many multiples of a row in each gradient, in place of products with the whole head. This is for Q-functions over
    the vocabulary, distillation of top-k logits, and divergences over a teacher's top k
    (``reference.linear_select``). Products and sums are fp32, and what is not masked alone is computed.

    A token reads k rows, so it costs less than all logits while k is a small part of the vocabulary: a product of many
    tokens reads each row once for all of them.

    Args:
        hidden: last hidden states, [..., H] with any leading dimensions, those of the tokens; fp32, bf16 or fp16.
        weight: the head, [V, H], or [V A, H] with ``atoms``; in hidden's dtype, or an fp32 master copy, which is read
            as it is.
        ids: token ids, [..., k], int64 or int32. An id may occur more than once.
        bias: [V], or [V A].
        atoms: A, where the head gives A numbers for each token id: id v owns the rows v A .. v A + A - 1. None: one,
            and the result has no dimension for it.
        temperature: divides the logits, > 0.
        softcap: z -> softcap * tanh(z / softcap) before the temperature (Gemma).
        mask: bool, the shape of the tokens, True at valid ones. What masked tokens hold changes nothing.
        packing: a ``pack(...)`` in place of the mask.

    Returns:
        fp32, [..., k], or [..., k, A] with ``atoms``; 0 at masked tokens. The gradient by the weight is dense, 0 in
        rows that no token took, and has the same bits on every run.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong. Ids out of range at valid tokens
            are found on CPU tensors, on a GPU under ``KLQ_CHECK=1``; otherwise their logit is NaN. A head that is a
            DTensor is refused: every process takes a whole one.
        RuntimeError: for a second derivative, in forward mode, and under ``torch.func.grad``.
    """
    check_whole("linear_select", hidden=hidden, weight=weight, bias=bias)
    require(hidden.dim() >= 1, "hidden", "must be [..., H], got a number")
    tokens = hidden.detach().new_empty(hidden.shape[:-1])
    layout = layout_of_any(tokens, mask=mask, packing=packing, name="hidden")
    hidden = check_linear(layout, hidden, weight, bias, temperature=temperature, softcap=softcap, logits_dtype=None)
    _check_ids(ids, hidden)
    _check_atoms(atoms, weight.shape[0])
    refuse_tangents(hidden=hidden, weight=weight, bias=bias)
    found = operator.Results(
        *operator.linear_select(
            *operator.Arguments(
                hidden=hidden.reshape(-1, hidden.shape[-1]),
                weight=weight,
                bias=bias,
                ids=ids.reshape(tokens.numel(), ids.shape[-1]).long().contiguous(),
                **layout.row_args(),
                atoms=1 if atoms is None else atoms,
                temperature=temperature,
                softcap=softcap,
            )
        )
    )
    return found.logits.reshape(ids.shape if atoms is None else (*ids.shape, atoms))


def _check_ids(ids: Tensor, hidden: Tensor) -> None:
    require_tensor("ids", ids)
    tokens = list(hidden.shape[:-1])
    fits = ids.dim() == hidden.dim() and ids.shape[:-1] == hidden.shape[:-1]
    if not fits:  # formatted only on failure, as below
        shape = ", ".join([*map(str, tokens), "k"])
        raise ValueError(f"ids: must be [{shape}], as hidden has the tokens {tokens}; got {list(ids.shape)}")
    require(ids.dtype in (torch.int64, torch.int32), "ids", f"must be int64 or int32, got {ids.dtype}")
    require(ids.device == hidden.device, "ids", f"must be on {hidden.device}, where hidden is")
    require_alike("ids", ids, "hidden", hidden)


def _check_atoms(atoms: int | None, rows: int) -> None:
    require(rows < 2**31, "weight", "must have fewer than 2**31 rows")
    if atoms is None:
        return
    # formatted only on failure: torch.compile cannot format a number that changes from call to call
    if not (isinstance(atoms, int) and not isinstance(atoms, bool) and atoms >= 1):
        raise ValueError(f"atoms: must be None or an int of 1 or more, got {atoms!r}")
    if rows % atoms != 0:
        raise ValueError(f"atoms: must divide the rows of weight, {rows}; got {atoms}")
