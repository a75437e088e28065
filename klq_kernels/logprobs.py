"""``linear_logprobs``: log-probabilities straight from hidden states, without the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .call.group import share_head, split_head
from .call.head import check_head
from .call.layout import Packing, layout_of
from .call.tokens import AllTokens
from .ops import linear_logprobs as operator
from .types import LinearLogprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    packing: Packing | None = None,
    return_entropy: bool = False,
    gradient: str = "dense",
    samples: int = 64,
    seed: int | Tensor | None = None,
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    sharding: str | None = None,
) -> LinearLogprobs:
    """log softmax(z)[action] with z = softcap(hidden @ weight.T + bias) / temperature, differentiable in all three.

    Forward is one matrix product over the vocabulary, done a chunk of rows at a time; backward recomputes each chunk
    (four products in all, against three in ``fused_klq_loss``). Only valid tokens are computed.

    Args:
        hidden: last hidden states, [B, T, H], or [N, H] with ``cu_seqlens``; fp32, bf16 or fp16. hidden[t] predicts
            actions[t]: shift before calling.
        weight: the lm_head, [V, H], in hidden's dtype, or an fp32 master copy. Products run in hidden's dtype.
        actions: taken token ids, [B, T] or [N], int64 or int32.
        bias: [V].
        temperature: divides the logits, > 0.
        softcap: z -> softcap * tanh(z / softcap) before the temperature (Gemma).
        logits_dtype: torch.float32 leaves the logits of 16-bit hidden states unrounded: log-probabilities are then
            accurate to 1e-4 or better where bf16 logits err by 3e-2. On an NVIDIA GPU the products stay in 16 bits and
            a chunk of logits takes twice the memory; elsewhere products run on fp32 copies of hidden and weight. By
            default logits have the dtype of hidden.
        mask: bool, the shape of actions, True at valid tokens. What masked tokens hold changes nothing.
        cu_seqlens: int32 [B + 1], makes the layout packed.
        packing: a ``pack(...)`` in place of mask and cu_seqlens.
        return_entropy: also the entropy of softmax(z), in nats.
        gradient: "dense", or "sampled": an unbiased estimate from a few entries of each row of the logits' gradient,
            for little more than the first product costs (``vocabulary.sampling``; ``reference.sampled_gradient`` states
            it). It has no part by the entropy.
        samples: K of the sampled gradient: at most K + 1 entries per token are kept on average, and the squared error
            is at most 1 / K of the squared gradient by the logits.
        seed: an int, or an int64 tensor of one number: the same seed gives the same entries. None draws one from
            torch's generator on the device.
        workspace_bytes: memory for one chunk of logits; by default up to 256 MiB on a CPU, where the native backend
            holds a strip of the vocabulary and seldom more than 16 MiB, and on a GPU up to 1 GiB, or in backward up to
            4 V H bytes where that is more.
        process_group: a torch.distributed group, or a DeviceMesh of one dimension, whose ranks share the head (tensor
            parallelism): ``weight`` and ``bias`` are this rank's rows, in rank order, as many as it has, and V is that
            of all. Every rank passes the same hidden states and tokens and gets the same results; the gradient by the
            hidden states is that of all, those by weight and bias are of its own rows (``vocabulary.sharded``). Not
            under ``torch.compile``.
        sharding: what moves where the weight is a ``DTensor`` split by rows and each rank has tokens of its own, as
            under FSDP2: "tokens", to the rows of the head, which is then whole nowhere; "head", to the tokens; None:
            what moves fewer bytes (``call.tokens``).

    Returns:
        ``LinearLogprobs(logprobs, logsumexp, entropy)``: fp32, the shape of actions, 0 at masked tokens; entropy is
        None unless asked for.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong. Token ids out of range at valid
            positions are found on CPU tensors, on a GPU under ``KLQ_CHECK=1``; otherwise their log-prob is NaN.
        RuntimeError: for a second derivative, in forward mode, and under ``torch.func.grad``; in backward, where a
            sampled gradient is asked for one by the entropy.
    """
    head = split_head(hidden, weight, bias, process_group, sharding)
    hidden = head.hidden
    layout = layout_of(actions, mask=mask, cu_seqlens=cu_seqlens, packing=packing, states=hidden)
    inputs = check_head(
        layout, hidden, head.weight, actions, head.bias, temperature=temperature, softcap=softcap,
        logits_dtype=logits_dtype, return_entropy=return_entropy, gradient=gradient, samples=samples, seed=seed,
        workspace_bytes=workspace_bytes, split=head.split,
    )  # fmt: skip
    settings = {
        "temperature": temperature, "softcap": softcap, "return_entropy": return_entropy,
        "workspace_bytes": workspace_bytes,
    }  # fmt: skip
    arguments = {**inputs._asdict(), **layout.row_args()}
    tokens, group = None, head.group
    if head.apart is not None:
        everyones = AllTokens(head.apart, layout, arguments, settings)
        if everyones.move_head(sharding, split_again=group is not None):
            arguments = everyones.with_whole_head(head.vocab)
        else:
            tokens, arguments, group = everyones, everyones.arguments(), head.apart
    found = operator.Results(
        *operator.linear_logprobs(
            *operator.Arguments(
                **arguments,
                **share_head(group, arguments, settings)._asdict(),
                temperature=temperature,
                softcap=softcap,
                return_entropy=return_entropy,
                workspace_bytes=workspace_bytes,
            )
        )
    )

    def shaped(vector: Tensor) -> Tensor:
        return (vector if tokens is None else tokens.own(vector)).reshape(layout.shape)

    return LinearLogprobs(shaped(found.logp), shaped(found.lse), shaped(found.entropy) if return_entropy else None)
