"""Other projects' fused heads, called the way their own trainers call them; each imported only when it runs."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import HeadInputs
from . import Call, Contender, Outputs, gradients
from .plain import logprobs_through, loss_through

TRL_VOCAB_CHUNK = 32_768  # what TRL's trainers pass


def liger_cross_entropy(inputs: HeadInputs) -> Call:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    labels = inputs.labels()

    def call() -> Outputs:
        loss = liger_fused_linear_cross_entropy(
            inputs.hidden, inputs.weight, labels, softcap=inputs.softcap, accum_dtype=torch.float32
        )
        return gradients(loss, hidden=inputs.hidden, weight=inputs.weight)

    return call


def liger_grpo(inputs: HeadInputs) -> Call:
    """Liger's RL loss is fixed to GRPO and to padded sequences; on-policy it is a policy gradient of known form."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    _no_softcap(inputs.softcap)
    starts, ends = inputs.cu_seqlens[:-1].long(), inputs.cu_seqlens[1:].long()
    there = ends > starts  # a problem cut to its first tokens has sequences without any
    starts, ends = starts[there], ends[there]
    step = torch.arange(int((ends - starts).max()), device=starts.device)
    index = (starts[:, None] + step).clamp(max=inputs.actions.numel() - 1)
    keep = starts[:, None] + step < ends[:, None]
    if inputs.mask is not None:
        keep &= inputs.mask[index]
    hidden = inputs.hidden.detach()[index].requires_grad_()
    loss_function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=hidden.is_cuda)
    actions, scores = inputs.actions[index], inputs.scores[starts]

    def call() -> Outputs:
        loss = loss_function(hidden, inputs.weight, actions, keep.to(hidden.dtype), scores)[0]
        found = gradients(loss, hidden=hidden, weight=inputs.weight)
        flat = torch.zeros_like(inputs.hidden)
        flat[index[keep]] = found["hidden"][keep]
        return {**found, "hidden": flat}

    return call


def liger_logprobs(hidden: Tensor, weight: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    _no_softcap(softcap)
    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, actions)


def cce_logprobs(hidden: Tensor, weight: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, actions, softcap=softcap, reduction="none")


def trl_logprobs(hidden: Tensor, weight: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, actions, 1.0, TRL_VOCAB_CHUNK, softcap, 1.0, ())[0]


def verl_logprobs(hidden: Tensor, weight: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    _no_softcap(softcap)
    return linear_cross_entropy(hidden, weight, actions, 1.0, "none")[0]


def flash_attn_logprobs(hidden: Tensor, weight: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    _no_softcap(softcap)
    return -cross_entropy_loss(F.linear(hidden, weight), actions, inplace_backward=True)[0]


def quack_cross_entropy(inputs: HeadInputs) -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _no_softcap(inputs.softcap)
    labels = inputs.labels()

    def call() -> Outputs:
        loss = chunked_linear_cross_entropy(inputs.hidden, inputs.weight, labels)
        return gradients(loss, hidden=inputs.hidden, weight=inputs.weight)

    return call


def _no_softcap(softcap: float | None) -> None:
    if softcap is not None:
        raise NotImplementedError("has no soft cap")


PER_TOKEN = [  # (name, function, module, install, needs a GPU)
    ("Liger scaled CE", liger_logprobs, "liger_kernel", "pip install liger-kernel", False),
    ("Apple CCE", cce_logprobs, "cut_cross_entropy", "pip install cut-cross-entropy", True),
    ("TRL chunked", trl_logprobs, "trl.kernels", "pip install trl", False),
    ("verl", verl_logprobs, "verl.utils.kernel", "pip install verl", True),
    ("flash-attn CE", flash_attn_logprobs, "flash_attn", "pip install flash-attn --no-build-isolation", True),
]

LOSS = [
    Contender(
        "Liger FLCE", liger_cross_entropy, "cross-entropy", "liger_kernel", "pip install liger-kernel", needs_gpu=True
    ),
    Contender("Liger GRPO", liger_grpo, "policy gradient", "liger_kernel", "pip install liger-kernel"),
    Contender("quack", quack_cross_entropy, "cross-entropy", "quack", "pip install quack-kernels", needs_gpu=True),
    *(
        Contender(name, partial(loss_through, f), "klq", module, install, gpu)
        for name, f, module, install, gpu in PER_TOKEN
    ),
]
LOGPROBS = [
    Contender(name, partial(logprobs_through, f), "klq", module, install, gpu)
    for name, f, module, install, gpu in PER_TOKEN
]
