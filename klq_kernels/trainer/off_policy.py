"""Corrections for samples of another policy than the one that learns; ``reference`` states them.

An engine with older weights or other arithmetic samples from mu, the trainer learns pi. Its log-probabilities of its
own tokens say how likely mu was to choose them, and the ratio pi / mu corrects for it: as the trace on lambda in the
targets of both algorithms (``importance_trace``), and in PPO as a weight on value targets (``vtrace_targets``) and on
the policy's gradient, which DPPO's mask bounds in place of PPO's clip (``dppo_policy_loss``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def importance_trace(logprobs: Tensor, sampler_logprobs: Tensor, clip: float) -> Tensor:
    """min(clip, pi / mu) of each token, fp32 [N]; no ratio overflows."""
    return (logprobs - sampler_logprobs).clamp(max=math.log(clip)).exp()


def trusted(logprobs: Tensor, sampler_logprobs: Tensor, advantages: Tensor, divergence: str, delta: float) -> Tensor:
    """DPPO's mask, bool [N]: False where a step would take pi further from mu than ``delta`` allows."""
    pi, mu = logprobs.exp(), sampler_logprobs.exp()
    if divergence == "tv":
        distance = (pi - mu).abs()
    else:
        others, sampler_others = torch.log1p(-pi), torch.log1p(-mu)
        rest = torch.where(mu < 1, (1 - mu) * (sampler_others - others), 0.0)
        distance = mu * (sampler_logprobs - logprobs) + rest
    return (distance <= delta) | (advantages * (logprobs - sampler_logprobs) <= 0)
