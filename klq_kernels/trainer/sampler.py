"""The prompts of each cycle: so many of a shuffled dataset, epoch after epoch."""

from __future__ import annotations

import math

import torch


class CycleSampler:
    """Indices of ``size`` prompts, ``per_cycle`` at a time, a function of (seed, cycle) alone.

    Every epoch is another permutation. Where the prompts do not divide into whole cycles, the last cycle of an epoch is
    filled up with the first prompts of that same permutation.
    """

    def __init__(self, size: int, *, per_cycle: int, seed: int) -> None:
        self._size, self._per_cycle, self._seed = size, per_cycle, seed

    @property
    def cycles(self) -> int:
        """Cycles of an epoch."""
        return math.ceil(self._size / self._per_cycle)

    def of(self, cycle: int) -> list[int]:
        """The indices of a cycle of the run."""
        epoch, place = divmod(cycle, self.cycles)
        order = torch.randperm(self._size, generator=torch.Generator().manual_seed(self._seed + epoch))
        first = place * self._per_cycle
        return order[torch.arange(first, first + self._per_cycle) % self._size].tolist()
