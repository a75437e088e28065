"""The running spread of numbers whose scale a run has to find out: scores, lambda-errors.

Moments are averages over cycles with weights that fall geometrically, over all processes, the cycle at hand included;
so the first cycle has its own. They are part of a checkpoint.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DECAY = 0.9  # of the weight of a cycle, from one to the next


class Running:
    """Weighted means of numbers and of their squares."""

    def __init__(self) -> None:
        self._weight = self._mean = self._square = 0.0

    def update(self, values: Tensor, accelerator: Any) -> None:
        """Takes a cycle in; of no values at all on any process, none. Every process must call it."""
        kept = values.detach().double()
        moments = torch.stack([kept.new_tensor(kept.numel()), kept.sum(), kept.square().sum()])
        count, total, squares = accelerator.reduce(moments.to(accelerator.device), reduction="sum").tolist()
        if count == 0:
            return
        self._weight = DECAY * self._weight + (1 - DECAY)
        share = (1 - DECAY) / self._weight
        self._mean += share * (total / count - self._mean)
        self._square += share * (squares / count - self._square)

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return math.sqrt(max(self._square - self._mean**2, 0.0))

    @property
    def rms(self) -> float:
        """The root mean square: the spread around 0."""
        return math.sqrt(self._square)

    def state(self) -> list[float]:
        return [self._weight, self._mean, self._square]

    def load_state(self, state: list[float]) -> None:
        self._weight, self._mean, self._square = state
