"""``linear_kl``: the divergence of two linear heads at each token, over the whole vocabulary, without the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .call.checks import require, require_alike
from .call.head import check_linear, check_whole, check_workspace
from .call.layout import Layout, Packing, layout_of
from .call.transforms import needs_gradient, refuse_tangents
from .ops import linear_kl as operator
from .vocabulary import chunking

DIRECTIONS = ("forward", "reverse")


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_temperature: float | None = None,
    ref_softcap: float | None = None,
    direction: str = "forward",
    logits_dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    packing: Packing | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """KL(pi || pi_ref) of each token's next-token distributions, exact, differentiable in hidden, weight and bias.

    pi = softmax(softcap(hidden @ weight.T + bias) / temperature), and pi_ref alike (``reference.linear_kl``). Where
    log-probabilities of the taken tokens estimate the divergence, this is its value: no sampling noise, and a
    gradient. Forward is two matrix products over the vocabulary, one per head, done a chunk of rows at a time; backward
    recomputes both and adds those of the policy's two gradients: six in all. Only valid tokens are computed.

    Equal policies give exactly 0, and no token's divergence is negative (``portable.row_kl``).

    Args:
        hidden: last hidden states of the policy, [B, T, H], or [N, H] with ``cu_seqlens``; fp32, bf16 or fp16.
        weight: the policy's lm_head, [V, H], in hidden's dtype, or an fp32 master copy. Products run in hidden's dtype.
        ref_hidden: last hidden states of the reference at the same tokens, [B, T, H'] or [N, H']; H' and the dtype may
            differ from those of hidden. The reference is a constant: detach what requires a gradient.
        ref_weight: the reference's lm_head, [V, H'].
        bias, ref_bias: [V]. Where both are -inf, the token is forbidden and has no part in the divergence.
        temperature: divides the policy's logits, > 0.
        softcap: z -> softcap * tanh(z / softcap) before the temperature (Gemma).
        ref_temperature, ref_softcap: of the reference; by default the policy's. ``ref_softcap=math.inf`` is none.
        direction: "forward": KL(pi || pi_ref) = sum_v pi_v (log pi_v - log pi_ref_v), as in RLHF's penalty; "reverse":
            KL(pi_ref || pi), as in distillation from the reference.
        logits_dtype: torch.float32 leaves the logits of 16-bit hidden states unrounded, as in ``linear_logprobs``.
        mask: bool, [B, T] or [N], True at valid tokens. What masked tokens hold changes nothing.
        cu_seqlens: int32 [B + 1], makes the layout packed.
        packing: a ``pack(...)`` in place of mask and cu_seqlens.
        workspace_bytes: memory for one chunk of both heads' logits; by default up to 256 MiB per head on a CPU, and up
            to 1 GiB per head on a GPU.

    Returns:
        fp32, [B, T] or [N], in nats, 0 at masked tokens. Infinite where the first distribution gives a probability to
        a token that the second forbids; in direction "forward" its gradient is then not finite.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong, or the ``ref_`` tensor that
            requires a gradient. A head that is a DTensor is refused: every process takes a whole one.
        RuntimeError: for a second derivative, in forward mode, and under ``torch.func.grad``.
    """
    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    check_whole("linear_kl", hidden=hidden, weight=weight, bias=bias, **reference)
    for name, tensor in reference.items():
        constant = tensor is None or not needs_gradient(tensor)
        require(constant, name, f"is a constant, and no gradient by it is computed; pass {name}.detach()")
    layout = _layout(hidden, mask, cu_seqlens, packing)
    hidden = check_linear(
        layout, hidden, weight, bias, temperature=temperature, softcap=softcap, logits_dtype=logits_dtype
    )
    require(ref_hidden.device == hidden.device, "ref_hidden", f"must be on {hidden.device}, where hidden is")
    require_alike("ref_hidden", ref_hidden, "hidden", hidden)
    vocab = weight.shape[0]
    same = ref_weight.dim() != 2 or ref_weight.shape[0] == vocab
    require(same, "ref_weight", f"must have the vocabulary of weight, {vocab} rows; got {list(ref_weight.shape)}")
    ref_temperature = temperature if ref_temperature is None else ref_temperature
    ref_softcap = softcap if ref_softcap is None else None if ref_softcap == math.inf else ref_softcap
    ref_hidden = check_linear(
        layout, ref_hidden, ref_weight, ref_bias, temperature=ref_temperature, softcap=ref_softcap,
        logits_dtype=logits_dtype, prefix="ref_",
    )  # fmt: skip
    require(direction in DIRECTIONS, "direction", f"must be one of {', '.join(DIRECTIONS)}; got {direction!r}")
    refuse_tangents(hidden=hidden, weight=weight, bias=bias)
    fp32_logits = logits_dtype == torch.float32
    _check_room(hidden, ref_hidden, vocab, fp32_logits, workspace_bytes)
    found = operator.Results(
        *operator.linear_kl(
            *operator.Arguments(
                hidden=hidden.reshape(-1, hidden.shape[-1]),
                weight=weight,
                bias=bias,
                ref_hidden=ref_hidden.reshape(-1, ref_hidden.shape[-1]),
                ref_weight=ref_weight,
                ref_bias=ref_bias,
                **layout.row_args(),
                temperature=temperature,
                softcap=softcap,
                ref_temperature=ref_temperature,
                ref_softcap=ref_softcap,
                fp32_logits=fp32_logits,
                reverse=direction == "reverse",
                workspace_bytes=workspace_bytes,
            )
        )
    )
    return found.kl.reshape(layout.shape)


def _layout(hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, packing: Packing | None) -> Layout:
    """The layout of the tokens, which here have no tensor but their hidden states."""
    packed = cu_seqlens is not None or (isinstance(packing, Packing) and len(packing.shape) == 1)
    wanted = "[N, H] where cu_seqlens are given" if packed else "[B, T, H], or [N, H] with cu_seqlens"
    require(hidden.dim() == (2 if packed else 3), "hidden", f"must be {wanted}; got {list(hidden.shape)}")
    tokens = hidden.detach().new_empty(hidden.shape[:-1])
    return layout_of(tokens, mask=mask, cu_seqlens=cu_seqlens, packing=packing, name="hidden")


def _check_room(hidden: Tensor, ref_hidden: Tensor, vocab: int, fp32_logits: bool, workspace_bytes: int | None) -> None:
    """The workspace holds a row of each head's logits."""
    check_workspace(workspace_bytes)
    if workspace_bytes is None:
        return
    stored = (
        chunking.head_dtypes(states.dtype, states.device, fp32_logits=fp32_logits).logits
        for states in (hidden, ref_hidden)
    )
    need = chunking.row_stride(vocab) * sum(dtype.itemsize for dtype in stored)
    enough = workspace_bytes >= need
    require(enough, "workspace_bytes", f"must hold a row of each head's logits, {need} bytes; got {workspace_bytes}")
