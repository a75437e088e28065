"""The three matrix products of the head, on one chunk of rows stored token by token.

They run in the dtype of the model where the processor multiplies it. A CPU without such instructions emulates them,
which takes several times as long as the same product in fp32 (and fp16 far longer still). There each product goes
through strips of the vocabulary, widened to fp32 as they come: exact inputs, fp32 sums, rounded once as they are
written, and no fp32 copy of the weight or of a chunk of logits. ``chunking.widens`` tells where.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunking
from .chunks import slices


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden @ weight.T (+ bias), into ``out``: in their dtype, or on a GPU in fp32, as the sums are."""
    if out.dtype != hidden.dtype:
        total = out if bias is None else out.copy_(bias)
        beta = 0 if bias is None else 1
        return torch.addmm(total, hidden, weight.T, out_dtype=out.dtype, beta=beta, out=out)
    if not chunking.widens(hidden.dtype, hidden.device):
        if bias is None:
            return torch.mm(hidden, weight.T, out=out)
        return torch.addmm(bias, hidden, weight.T, out=out)
    wide = hidden.float()
    for strip in slices(weight.shape[0], chunking.WIDE_COLUMNS):
        wide_bias = None if bias is None else bias[strip].float()
        out[:, strip] = torch.nn.functional.linear(wide, weight[strip].float(), wide_bias)
    return out


def project_back(dlogits: Tensor, weight: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """dlogits @ weight in ``dtype``, theirs or fp32: on a GPU in ``out``, if given. On a CPU always in memory of its
    own, since a GEMM may add in another order where its output is aligned otherwise.
    """
    if dlogits.is_cuda and dtype != dlogits.dtype:
        return torch.mm(dlogits, weight, out_dtype=dtype, out=out)
    if dtype == dlogits.dtype and not chunking.widens(dtype, dlogits.device):
        return torch.mm(dlogits, weight, out=out if dlogits.is_cuda else None)
    total = dlogits.new_zeros(dlogits.shape[0], weight.shape[1], dtype=torch.float32)
    for strip in slices(weight.shape[0], chunking.WIDE_COLUMNS):
        total.addmm_(dlogits[:, strip].float(), weight[strip].float())
    return total.to(dtype)


def accumulate(total: Tensor, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """total (+)= dlogits.T @ hidden, with ``total`` fp32 or in the dtype of the operands; ``first`` overwrites."""
    if chunking.widens(dlogits.dtype, dlogits.device):
        wide = hidden.float()
        for strip in slices(total.shape[0], chunking.WIDE_COLUMNS):
            add_product(total[strip], dlogits[:, strip].float().T, wide, first)
    elif dlogits.is_cuda and total.dtype != dlogits.dtype:  # fp32 output straight from the GEMM's accumulator
        torch.addmm(total, dlogits.T, hidden, out_dtype=torch.float32, beta=0 if first else 1, out=total)
    elif total.dtype != dlogits.dtype:
        for strip in slices(total.shape[0], chunking.STRIP_ROWS):
            add_product(total[strip], dlogits[:, strip].T, hidden, first)
    else:
        add_product(total, dlogits.T, hidden, first)


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total (+)= left @ right, in memory where total has their dtype, else rounded to theirs before it is added.

    Not so in fp16: a sum over many tokens may lie beyond it where their mean, which the caller sees, does not.
    A product of one column is a matrix times a vector, which some libraries add up one term after the other: over a
    large vocabulary that loses digits, which a row sum keeps.
    """
    if left.dtype == torch.float16 and total.dtype == torch.float32:
        left, right = left.float(), right.float()
    if right.shape[1] == 1 and left.dtype == torch.float32:
        product = (left * right.T).sum(1, keepdim=True)
        total.copy_(product) if first else total.add_(product)
    elif total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(torch.mm(left, right))
    else:
        total.add_(torch.mm(left, right))
