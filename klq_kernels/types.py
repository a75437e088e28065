"""The results of the public functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LinearLogprobs(NamedTuple):
    """Per-token log-probabilities of a linear head, fp32, in the caller's layout, 0 at masked tokens."""

    logprobs: Tensor
    logsumexp: Tensor
    entropy: Tensor | None


class KLQTargets(NamedTuple):
    """The part of a rollout that an update needs: three fp32 tensors in the caller's layout, 0 at masked tokens.

    ``advantages`` is the lambda-error A_t, unscaled by alpha and never whitened.
    """

    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor


class KLQLoss(NamedTuple):
    """The scalar loss, and a dict of detached 0-d fp32 tensors describing it."""

    loss: Tensor
    metrics: dict[str, Tensor]


# A rollout buffer that was saved with torch.save is loaded again by torch.load as it is.
torch.serialization.add_safe_globals([LinearLogprobs, KLQTargets, KLQLoss])
