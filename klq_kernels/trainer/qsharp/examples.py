"""What a guide learns from: completions of the reference, the rewards they earned, and where their training begins."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..batches import Sequence
from ..seeds import Purpose, derived_seed


class Example(NamedTuple):
    """One completion. The law is learnt after each token from ``first`` on, from which the reference goes on."""

    prompt: list[int]
    completion: list[int]
    first: int  # position in the completion, 0 <= first < its length
    reward: float
    row: int  # of the dataset

    def sequence(self) -> Sequence:
        """As the trainer lays sequences out, its trained tokens being those after which the law is learnt."""
        trained = torch.arange(len(self.completion)) >= self.first
        return Sequence(torch.tensor(self.prompt), torch.tensor(self.completion), trained)


class Examples:
    """The examples of all rounds so far, the same on all processes; kept as tensors, 4 bytes a token."""

    def __init__(self) -> None:
        self.rounds = 0  # that have been collected
        self._ids = torch.zeros(0, dtype=torch.int32)  # prompt and completion of each example, one after another
        self._numbers = torch.zeros(0, 4, dtype=torch.int64)  # lengths of both, first, row
        self._rewards = torch.zeros(0, dtype=torch.float64)
        self._ends = torch.zeros(0, dtype=torch.int64)  # of the examples in the ids

    def __len__(self) -> int:
        return len(self._rewards)

    def add(self, examples: list[Example]) -> None:
        """A round's."""
        self.rounds += 1
        if not examples:
            return
        ids = [torch.tensor([*e.prompt, *e.completion], dtype=torch.int32) for e in examples]
        numbers = [[len(e.prompt), len(e.completion), e.first, e.row] for e in examples]
        rewards = [e.reward for e in examples]
        self._hold(
            torch.cat([self._ids, *ids]),
            torch.cat([self._numbers, torch.tensor(numbers)]),
            torch.cat([self._rewards, torch.tensor(rewards, dtype=torch.float64)]),
        )

    def _hold(self, ids: Tensor, numbers: Tensor, rewards: Tensor) -> None:
        self._ids, self._numbers, self._rewards = ids, numbers, rewards
        self._ends = numbers[:, :2].sum(1).cumsum(0)

    def __getitem__(self, i: int) -> Example:
        prompt, completion, first, row = self._numbers[i].tolist()
        end = int(self._ends[i])
        ids = self._ids[end - prompt - completion : end].tolist()
        return Example(ids[:prompt], ids[prompt:], first, float(self._rewards[i]), row)

    def draw(self, numbers: list[int], seed: int) -> list[Example]:
        """The examples at ``numbers`` of an endless row of shuffled passes over all, a function of seed and round."""
        size, orders = len(self), {}
        for turn in {n // size for n in numbers}:
            generator = torch.Generator().manual_seed(derived_seed(seed, Purpose.SHUFFLE, self.rounds, turn))
            orders[turn] = torch.randperm(size, generator=generator)
        return [self[int(orders[n // size][n % size])] for n in numbers]

    def save(self, file: Path) -> None:
        """Writes all of them."""
        state = {"rounds": self.rounds, "ids": self._ids, "numbers": self._numbers, "rewards": self._rewards}
        torch.save(state, file)

    @classmethod
    def load(cls, file: Path) -> Examples:
        """What ``save`` wrote."""
        state = torch.load(file, weights_only=True)
        out = cls()
        out.rounds = state["rounds"]
        out._hold(state["ids"], state["numbers"], state["rewards"])
        return out


def varied(examples: list[Example]) -> list[Example]:
    """Those of rows whose examples do not all earn the same: the others say nothing of one token against another."""
    rewards: dict[int, set[float]] = {}
    for example in examples:
        rewards.setdefault(example.row, set()).add(example.reward)
    return [e for e in examples if len(rewards[e.row]) > 1]
