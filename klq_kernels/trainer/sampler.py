"""The prompts of each cycle.

A cycle takes one batch of prompts over all processes and several optimizer steps on it. transformers' loop asks for
data once per micro-batch, so the sampler repeats each cycle's prompts once for every micro-batch of the cycle; the
trainer looks at the first copy only. Skipping batches, which is how the loop resumes, then lands in the right cycle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class CycleSampler(Sampler[int]):
    """Indices of ``size`` prompts, ``per_cycle`` at a time, each such batch ``repeats`` times over.

    Every epoch is a permutation that depends on (seed, epoch) alone. Where the prompts do not divide into whole cycles,
    the last cycle is filled up with the first prompts of that same permutation.

    ``cycle`` tells how many cycles of the run are over; an iteration asks it which epoch begins. To be told by
    ``set_epoch`` is not enough: the loader of a resumed run on several processes is wrapped too deep to pass it on.
    """

    def __init__(self, size: int, *, per_cycle: int, repeats: int, seed: int, cycle: Callable[[], int]) -> None:
        self._size, self._per_cycle, self._repeats, self._seed = size, per_cycle, repeats, seed
        self._cycle = cycle

    @property
    def cycles(self) -> int:
        return math.ceil(self._size / self._per_cycle)

    def __len__(self) -> int:
        return self.cycles * self._per_cycle * self._repeats

    def __iter__(self) -> Iterator[int]:
        begin = self._cycle() // self.cycles * self.cycles
        for cycle in range(begin, begin + self.cycles):
            indices = self.of(cycle)
            for _ in range(self._repeats):
                yield from indices

    def of(self, cycle: int) -> list[int]:
        """The indices of a cycle of the run."""
        epoch, place = divmod(cycle, self.cycles)
        order = torch.randperm(self._size, generator=torch.Generator().manual_seed(self._seed + epoch)).tolist()
        first = place * self._per_cycle
        return [order[i % self._size] for i in range(first, first + self._per_cycle)]
