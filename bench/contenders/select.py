"""The logits of a few ids per token, and gradients by them: ``linear_select``, full logits, and gathered rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from klq_kernels import linear_select, pack

from ..inputs import HeadInputs
from . import Call, Contender, Outputs, gradients

IDS = 32  # per token, as many as a teacher's top of the vocabulary in distillation


def ids_of(inputs: HeadInputs) -> Tensor:
    """int64 [M, IDS]: the taken token, and others in proportion to their rank, so that many tokens share some."""
    vocab = inputs.weight.shape[0]
    drawn = torch.rand(inputs.actions.numel(), IDS - 1, generator=torch.Generator().manual_seed(5))
    others = (vocab**drawn - 1).long().to(inputs.actions.device)
    return torch.cat([inputs.actions[:, None], others.clamp(0, vocab - 1)], 1)


def loss_of(logits: Tensor) -> Tensor:
    """One that every logit has a part in."""
    return 0.5 * logits.square().mean()


def ours(inputs: HeadInputs) -> Call:
    ids = ids_of(inputs)
    packing = None if inputs.mask is None else pack(inputs.mask, cu_seqlens=inputs.cu_seqlens)

    def call() -> Outputs:
        logits = linear_select(inputs.hidden, inputs.weight, ids, softcap=inputs.softcap, packing=packing)
        return gradients(loss_of(inputs.valid(logits)), hidden=inputs.hidden, weight=inputs.weight)

    return call


def naive(inputs: HeadInputs) -> Call:
    """Through the full logits in the model's dtype."""
    ids = inputs.valid(ids_of(inputs))

    def call() -> Outputs:
        found = F.linear(inputs.valid(inputs.hidden), inputs.weight).gather(1, ids).float()
        if inputs.softcap is not None:
            found = inputs.softcap * torch.tanh(found / inputs.softcap)
        return gradients(loss_of(found), hidden=inputs.hidden, weight=inputs.weight)

    return call


def gathered(inputs: HeadInputs) -> Call:
    """Copies of the rows, [n, IDS, H], and a batched product. Autograd adds up their gradients in the model's dtype."""
    ids = inputs.valid(ids_of(inputs))

    def call() -> Outputs:
        rows = F.embedding(ids, inputs.weight)
        found = torch.bmm(rows, inputs.valid(inputs.hidden)[..., None])[..., 0].float()
        if inputs.softcap is not None:
            found = inputs.softcap * torch.tanh(found / inputs.softcap)
        return gradients(loss_of(found), hidden=inputs.hidden, weight=inputs.weight)

    return call


SELECT = [Contender("klq_kernels", ours), Contender("naive", naive), Contender("gathered rows", gathered)]
