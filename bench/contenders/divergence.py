"""KL(pi || pi_ref) of two heads over the whole vocabulary: its mean over the tokens, and gradients by the policy."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from klq_kernels import linear_kl, pack

from ..inputs import HeadInputs
from . import Call, Contender, Outputs, gradients

CHUNK = 1024  # tokens at a time where logits are recomputed, as many as Liger takes
DISTANCE = 0.1  # of the reference from the policy, in standard deviations of either's tensors
Divergence = Callable[[Tensor, Tensor, Tensor, Tensor, float | None], Tensor]


def reference_of(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """(ref_hidden [M, H], ref_weight [V, H]), somewhat away from the policy's."""
    generator = torch.Generator().manual_seed(11)
    out = []
    for tensor in (inputs.hidden.detach(), inputs.weight.detach()):
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        out.append(tensor + DISTANCE * tensor.float().std().to(tensor.dtype) * noise)
    return out[0], out[1]


def ours(inputs: HeadInputs) -> Call:
    ref_hidden, ref_weight = reference_of(inputs)
    packing = None if inputs.mask is None else pack(inputs.mask, cu_seqlens=inputs.cu_seqlens)
    cu_seqlens = inputs.cu_seqlens if packing is None else None

    def call() -> Outputs:
        found = linear_kl(
            inputs.hidden,
            inputs.weight,
            ref_hidden,
            ref_weight,
            softcap=inputs.softcap,
            packing=packing,
            cu_seqlens=cu_seqlens,
        )
        return gradients(inputs.valid(found).mean(), hidden=inputs.hidden, weight=inputs.weight)

    return call


def of_rows(divergence: Divergence, inputs: HeadInputs) -> Call:
    """The mean of ``divergence`` of the valid rows."""
    ref_hidden, ref_weight = reference_of(inputs)
    ref_hidden = inputs.valid(ref_hidden)

    def call() -> Outputs:
        found = divergence(inputs.valid(inputs.hidden), inputs.weight, ref_hidden, ref_weight, inputs.softcap)
        return gradients(found.mean(), hidden=inputs.hidden, weight=inputs.weight)

    return call


def through_logits(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, softcap: float | None
) -> Tensor:
    """Both logits whole, in the model's dtype, and their log-probabilities in fp32: [n]."""

    def logp(states: Tensor, head: Tensor) -> Tensor:
        logits = F.linear(states, head).float()
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)

    policy, reference = logp(hidden, weight), logp(ref_hidden, ref_weight)
    return (policy.exp() * (policy - reference)).sum(-1)


def in_chunks(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, softcap: float | None) -> Tensor:
    """The same some tokens at a time, with torch's checkpoints: backward computes the logits again."""
    parts = zip(hidden.split(CHUNK), ref_hidden.split(CHUNK), strict=True)
    return torch.cat(
        [checkpoint(through_logits, h, weight, r, ref_weight, softcap, use_reentrant=False) for h, r in parts]
    )


def trl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, softcap: float | None) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    one = (1.0, softcap)  # logit scale and soft cap
    return ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0, 1.0, *one, *one)[0]


def liger(inputs: HeadInputs) -> Call:
    """Liger's distillation loss at beta = 1 without its hard part, of which it takes the cross-entropy all the same."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    if inputs.softcap is not None:
        raise NotImplementedError("has no soft cap")
    ref_hidden, ref_weight = reference_of(inputs)
    ref_hidden, actions = inputs.valid(ref_hidden), inputs.valid(inputs.actions)
    compiled = inputs.hidden.is_cuda
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled, chunk_size=CHUNK
    )

    def call() -> Outputs:
        found = loss(inputs.valid(inputs.hidden), inputs.weight, ref_hidden, ref_weight, actions)
        return gradients(found, hidden=inputs.hidden, weight=inputs.weight)

    return call


KL = [
    Contender("klq_kernels", ours),
    Contender("naive", lambda inputs: of_rows(through_logits, inputs)),
    Contender("checkpointed chunks", lambda inputs: of_rows(in_chunks, inputs)),
    Contender("TRL chunked", lambda inputs: of_rows(trl, inputs), module="trl.kernels", install="pip install trl"),
    Contender("Liger JSD", liger, module="liger_kernel", install="pip install liger-kernel"),
]
