"""Backward recurrences over time: the loop everybody writes, the best of plain PyTorch, and other projects' kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..inputs import ScanInputs
from . import Call, Contender, Outputs

Errors = Callable[[Tensor, float], Tensor]  # (delta [B, T], decay) -> A [B, T], both 0 beyond the last valid token


def loop(delta: Tensor, decay: float) -> Tensor:
    """One step of Python per time step, all sequences at once."""
    out = torch.empty_like(delta)
    following = torch.zeros_like(delta[:, 0])
    for t in range(delta.shape[1] - 1, -1, -1):
        following = delta[:, t] + decay * following
        out[:, t] = following
    return out


def doubling(delta: Tensor, decay: float) -> Tensor:
    """log2(T) vectorised steps: after the step of width k each token has absorbed the 2k tokens from itself on."""
    width, total = 1, delta
    while width < delta.shape[1]:
        total = total + decay**width * torch.nn.functional.pad(total[:, width:], (0, width))
        width *= 2
    return total


def compiled_doubling(delta: Tensor, decay: float) -> Tensor:
    return _compiled(delta, decay)


_compiled = torch.compile(doubling, dynamic=False)


def _valid(inputs: ScanInputs, tensor: Tensor) -> Tensor:
    return tensor if inputs.mask is None else torch.where(inputs.mask, tensor, 0.0)


def _next_values(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values[:, 1:], (0, 1))


def _last(inputs: ScanInputs) -> Tensor:
    """bool [B, T]: the last valid token of each sequence."""
    mask = torch.ones_like(inputs.values, dtype=torch.bool) if inputs.mask is None else inputs.mask
    return mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))


def gae_by(errors: Errors, inputs: ScanInputs) -> Call:
    def call() -> Outputs:
        values = _valid(inputs, inputs.values).float()
        delta = _valid(inputs, inputs.rewards).float() + inputs.gamma * _next_values(values) - values
        return {"advantages": errors(delta, inputs.gamma * inputs.lam)}

    return call


def targets_by(errors: Errors, inputs: ScanInputs) -> Call:
    def call() -> Outputs:
        values = _valid(inputs, inputs.values).float()
        log_ratio = _valid(inputs, inputs.logprobs.float() - inputs.ref_logprobs.float())
        q = inputs.tau * log_ratio + values
        delta = _valid(inputs, inputs.rewards).float() + inputs.gamma * _next_values(values) - q
        return {"advantages": errors(delta, inputs.gamma * inputs.lam)}

    return call


def torchrl_gae(inputs: ScanInputs) -> Call:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    done = _last(inputs)[..., None]

    def call() -> Outputs:
        values = inputs.values[..., None]
        following = _next_values(inputs.values)[..., None]
        found, _ = vec_generalized_advantage_estimate(
            inputs.gamma, inputs.lam, values, following, inputs.rewards[..., None], done, done
        )
        return {"advantages": _valid(inputs, found[..., 0])}

    return call


def rl_triton_gae(inputs: ScanInputs) -> Call:
    from rl_triton import compute_gae

    ends = _last(inputs).float()

    def call() -> Outputs:
        found = compute_gae(inputs.rewards, inputs.values, ends, gamma=inputs.gamma, lambda_=inputs.lam)
        return {"advantages": _valid(inputs, found)}

    return call


SCAN = [
    Contender("naive", lambda inputs: gae_by(loop, inputs)),
    Contender("doubling", lambda inputs: gae_by(doubling, inputs)),
    Contender("doubling, compiled", lambda inputs: gae_by(compiled_doubling, inputs)),
    Contender("torchrl", torchrl_gae, module="torchrl", install="pip install torchrl"),
    Contender(
        "rl-triton",
        rl_triton_gae,
        module="rl_triton",
        install="pip install git+https://github.com/simonsays1980/rl-triton",
        needs_gpu=True,
    ),
]
TARGETS = [
    Contender("naive", lambda inputs: targets_by(loop, inputs)),
    Contender("doubling", lambda inputs: targets_by(doubling, inputs)),
    Contender("doubling, compiled", lambda inputs: targets_by(compiled_doubling, inputs)),
]
