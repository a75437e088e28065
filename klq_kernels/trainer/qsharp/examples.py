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
    """The examples of all rounds so far, the same on all processes."""

    def __init__(self) -> None:
        self.rounds = 0  # that have been collected
        self._examples: list[Example] = []

    def __len__(self) -> int:
        return len(self._examples)

    def add(self, examples: list[Example]) -> None:
        """A round's."""
        self._examples += examples
        self.rounds += 1

    def draw(self, numbers: list[int], seed: int) -> list[Example]:
        """The examples at ``numbers`` of an endless row of shuffled passes over all, a function of seed and round."""
        size, orders = len(self), {}
        for turn in {n // size for n in numbers}:
            generator = torch.Generator().manual_seed(derived_seed(seed, Purpose.SHUFFLE, self.rounds, turn))
            orders[turn] = torch.randperm(size, generator=generator)
        return [self._examples[int(orders[n // size][n % size])] for n in numbers]

    def save(self, file: Path) -> None:
        """Writes all of them as tensors."""
        ids = [torch.tensor([*e.prompt, *e.completion], dtype=torch.int32) for e in self._examples]
        numbers = [[len(e.prompt), len(e.completion), e.first, e.row] for e in self._examples]
        state = {
            "rounds": self.rounds,
            "ids": torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int32),
            "numbers": torch.tensor(numbers, dtype=torch.int64).reshape(-1, 4),
            "rewards": torch.tensor([e.reward for e in self._examples], dtype=torch.float64),
        }
        torch.save(state, file)

    @classmethod
    def load(cls, file: Path) -> Examples:
        """What ``save`` wrote."""
        state = torch.load(file, weights_only=True)
        out = cls()
        out.rounds = state["rounds"]
        numbers: Tensor = state["numbers"]
        rows = state["ids"].split((numbers[:, 0] + numbers[:, 1]).tolist())
        for ids, (prompt, _, first, row), reward in zip(rows, numbers.tolist(), state["rewards"].tolist(), strict=True):
            out._examples.append(Example(ids[:prompt].tolist(), ids[prompt:].tolist(), first, reward, row))
        return out


def varied(examples: list[Example]) -> list[Example]:
    """Those of rows whose examples do not all earn the same: the others say nothing of one token against another."""
    rewards: dict[int, set[float]] = {}
    for example in examples:
        rewards.setdefault(example.row, set()).add(example.reward)
    return [e for e in examples if len(rewards[e.row]) > 1]
