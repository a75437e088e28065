"""PyTorch alone: full logits, the same compiled, checkpointed chunks, and its own fused cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from klq_kernels.reference import klq_residual_loss

from ..inputs import HeadInputs
from . import Call, Contender, Outputs, gradients

CHUNK_ROWS = 1024
TAU = 0.05

Logprobs = Callable[[Tensor, Tensor, Tensor, "float | None"], Tensor]


def naive_logprobs(hidden: Tensor, weight: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    """Through the full logits in the model's dtype."""
    return _select(F.linear(hidden, weight), actions, softcap)


def fp32_logprobs(hidden: Tensor, weight: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    """Through the full logits, upcast first, as trainers do that compare log-probs with a sampler's."""
    return _select(F.linear(hidden, weight).float(), actions, softcap)


def chunked_logprobs(hidden: Tensor, weight: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    """A chunk of rows at a time, each recomputed in backward."""
    if not torch.is_grad_enabled():
        pieces = zip(hidden.split(CHUNK_ROWS), actions.split(CHUNK_ROWS), strict=True)
        return torch.cat([naive_logprobs(h, weight, a, softcap) for h, a in pieces])
    return torch.cat(
        [
            checkpoint(naive_logprobs, h, weight, a, softcap, use_reentrant=False)
            for h, a in zip(hidden.split(CHUNK_ROWS), actions.split(CHUNK_ROWS), strict=True)
        ]
    )


def _select(logits: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    """By cross-entropy rather than log_softmax and gather, whose backward takes longer and, in 16 bits, more memory."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits, actions, reduction="none")


def klq_from_logprobs(logprobs: Tensor, inputs: HeadInputs) -> Tensor:
    """The KLQ loss of the valid rows, for contenders that end at log-probabilities."""
    old_logprobs, old_values, advantages = inputs.valid_targets()
    change = inputs.valid(inputs.values) - old_values
    return klq_residual_loss(logprobs.float() - old_logprobs, change, advantages, tau=TAU).mean()


def loss_through(logprobs: Logprobs, inputs: HeadInputs) -> Call:
    """Loss and gradients by way of a function that computes log-probabilities."""
    actions = inputs.valid(inputs.actions)

    def call() -> Outputs:
        taken = logprobs(inputs.valid(inputs.hidden), inputs.weight, actions, inputs.softcap)
        loss = klq_from_logprobs(taken, inputs)
        return gradients(loss, hidden=inputs.hidden, weight=inputs.weight, values=inputs.values)

    return call


def logprobs_through(logprobs: Logprobs, inputs: HeadInputs) -> Call:
    """Log-probabilities alone, as a rollout is scored."""
    actions = inputs.valid(inputs.actions)

    @torch.no_grad()
    def call() -> Outputs:
        return {"logprobs": logprobs(inputs.valid(inputs.hidden), inputs.weight, actions, inputs.softcap)}

    return call


def compiled(function: Logprobs) -> Logprobs:
    """A copy of the function for torch.compile to specialise on one shape."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def torch_cross_entropy(inputs: HeadInputs) -> Call:
    """torch's chunked linear cross-entropy; mean cross-entropy only."""
    if inputs.softcap is not None:
        raise NotImplementedError("has no soft cap")
    options = torch.nn.LinearCrossEntropyOptions()
    labels = inputs.labels()

    def call() -> Outputs:
        loss = F.linear_cross_entropy(inputs.hidden, inputs.weight, labels, options=options)
        return gradients(loss, hidden=inputs.hidden, weight=inputs.weight)

    return call


LOSS = [
    Contender("naive", lambda inputs: loss_through(naive_logprobs, inputs)),
    Contender("naive, fp32 logits", lambda inputs: loss_through(fp32_logprobs, inputs)),
    Contender("torch.compile", lambda inputs: loss_through(compiled(naive_logprobs), inputs)),
    Contender("chunked autograd", lambda inputs: loss_through(chunked_logprobs, inputs)),
    Contender(
        "F.linear_cross_entropy",
        torch_cross_entropy,
        computes="cross-entropy",
        module="torch.nn:LinearCrossEntropyOptions",
        install="pip install 'torch>=2.13'",
    ),
]
LOGPROBS = [
    Contender("naive", lambda inputs: logprobs_through(naive_logprobs, inputs)),
    Contender("naive, fp32 logits", lambda inputs: logprobs_through(fp32_logprobs, inputs)),
    Contender("torch.compile", lambda inputs: logprobs_through(compiled(naive_logprobs), inputs)),
    Contender("chunked", lambda inputs: logprobs_through(chunked_logprobs, inputs)),
]
