"""klq_kernels itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from klq_kernels import fused_klq_loss, gae, klq_loss, klq_targets, linear_logprobs, pack

from ..inputs import HeadInputs, ScanInputs
from . import Call, Contender, Outputs, gradients
from .plain import TAU

NAME = "klq_kernels"
NOISE = 0.25  # of the default 64 samples: twice the bound on the error by the logits


def _layout(inputs: HeadInputs) -> dict[str, Any]:
    """Valid rows are found once per batch, as a trainer does for its epochs; the others are handed theirs too."""
    if inputs.mask is None:
        return {"cu_seqlens": inputs.cu_seqlens}
    return {"packing": pack(inputs.mask, cu_seqlens=inputs.cu_seqlens)}


def fused(inputs: HeadInputs, **options: Any) -> Call:
    """Three products, gradients formed in the forward; a frozen head gets none."""
    layout = _layout(inputs)

    def call() -> Outputs:
        loss = fused_klq_loss(
            inputs.hidden, inputs.weight, inputs.actions, inputs.values, targets=inputs.targets, tau=TAU,
            **layout, softcap=inputs.softcap, **options,
        ).loss  # fmt: skip
        return gradients(loss, hidden=inputs.hidden, weight=inputs.weight, values=inputs.values)

    return call


def sampled(inputs: HeadInputs) -> Call:
    """One product, and sums of a few rows per token in place of the other two, by the library's default of samples."""
    return fused(inputs, gradient="sampled", seed=1)


def sampled_for_hidden(inputs: HeadInputs) -> Call:
    """The same for a head that is frozen."""
    return sampled(replace(inputs, weight=inputs.weight.detach()))


def recomputed(inputs: HeadInputs) -> Call:
    """Four products: log-probabilities first, any loss on top."""
    layout = _layout(inputs)

    def call() -> Outputs:
        logprobs = _logprobs(inputs, layout)
        loss = klq_loss(logprobs, inputs.values, inputs.targets, tau=TAU, **layout).loss
        return gradients(loss, hidden=inputs.hidden, weight=inputs.weight, values=inputs.values)

    return call


def score(inputs: HeadInputs) -> Call:
    layout = _layout(inputs)

    @torch.no_grad()
    def call() -> Outputs:
        return {"logprobs": inputs.valid(_logprobs(inputs, layout))}

    return call


def _logprobs(inputs: HeadInputs, layout: dict[str, Any]) -> Tensor:
    return linear_logprobs(inputs.hidden, inputs.weight, inputs.actions, **layout, softcap=inputs.softcap).logprobs


def advantages(inputs: ScanInputs) -> Call:
    def call() -> Outputs:
        return {
            "advantages": gae(inputs.rewards, inputs.values, gamma=inputs.gamma, lam=inputs.lam, mask=inputs.mask),
        }

    return call


def targets(inputs: ScanInputs) -> Call:
    def call() -> Outputs:
        found = klq_targets(
            inputs.logprobs, inputs.ref_logprobs, inputs.values, inputs.rewards,
            tau=inputs.tau, gamma=inputs.gamma, lam=inputs.lam, mask=inputs.mask,
        )  # fmt: skip
        return {"advantages": found.advantages}

    return call


LOSS = [
    Contender(NAME, fused),
    Contender(f"{NAME}, recomputing", recomputed),
    Contender(f"{NAME}, sampled", sampled, noise=NOISE),
]
LOGPROBS = [Contender(NAME, score)]
SCAN = [Contender(NAME, advantages)]
TARGETS = [Contender(NAME, targets)]
