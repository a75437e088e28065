"""Demonstrations: completions that someone else wrote, learnt from beside the replayed ones of the policy.

The reward functions score them as they score the policy's own, and policy, value function and reference read them when
their cycle comes. Nobody knows how likely their author was to write them. The trace of tree backup needs no such
number: c = pi, the policy's own probability of the token (``reference.tree_backup_trace``). It is what the Retrace
trace min(clip, pi / mu) is for an author who could not have written anything else, mu = 1.

They come in turn, as prompts do (``sampler``), in an order that depends on the seed alone: each cycle knows its own, so
a checkpoint has nothing to keep of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from typing import Any

import torch

from ..call.checks import require
from .rollout import Rollout
from .sampler import CycleSampler
from .written import Reader

COLUMN = "completion"


class Demonstrations:
    """The demonstrations of one process.

    Args:
        dataset: rows with ``prompt``, ``completion`` and what the reward functions read.
        reader: makes sequences of them. A completion that it cut before its EOS counts as truncated.
        number, passes: this process learns from so many in each of so many passes of a cycle.
        process, processes: this one's number, of how many.
        seed: of their order.

    Raises:
        ValueError: naming what is wrong with a row of the dataset or with the tokenizer.
    """

    def __init__(
        self, dataset: Many[dict[str, Any]], reader: Reader, *, number: int, passes: int, process: int, processes: int,
        seed: int,
    ) -> None:  # fmt: skip
        for row, content in enumerate(dataset):
            require(
                bool(content.get("prompt")) and bool(content.get(COLUMN)),
                "demonstrations",
                f"row {row} must have a prompt and a {COLUMN} that are not empty; got {content!r:.120}",
            )
        require(
            reader.tokenizer.eos_token_id in reader.ends,
            "demonstrations",
            f"end with the tokenizer's EOS, {reader.tokenizer.eos_token_id}, and completions of the policy with one of "
            f"{sorted(reader.ends)}; give a tokenizer or a generation_config with the same",
        )
        self.number = number
        self._dataset, self._reader = dataset, reader
        self._first = process * passes * number
        self._order = CycleSampler(len(dataset), per_cycle=processes * passes * number, seed=seed)
        self.rollout(self.rows(0, 0)[:1])

    def rows(self, cycle: int, turn: int) -> list[dict[str, Any]]:
        """This process's in a cycle of the run, for the pass ``turn``."""
        begin = self._first + turn * self.number
        return [self._dataset[i] for i in self._order.of(cycle)[begin : begin + self.number]]

    def rollout(self, rows: Many[dict[str, Any]]) -> Rollout:
        """Their completions, as if they had been sampled: with certainty, that is with log-probabilities of 0."""
        with naming_them():
            sequences = self._reader.sequences(list(rows), COLUMN)
        truncated = [int(s.completion[-1]) not in self._reader.ends for s in sequences]
        certain = torch.zeros(sum(s.rows for s in sequences))
        return Rollout(sequences, torch.tensor(truncated), certain)


@contextmanager
def naming_them() -> Iterator[None]:
    """Says of a ValueError inside that it is about the demonstrations."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"demonstrations: {error}") from error


def without_completion(row: dict[str, Any]) -> dict[str, Any]:
    """What the reward functions get of a row beside the completion itself."""
    return {name: value for name, value in row.items() if name != COLUMN}
