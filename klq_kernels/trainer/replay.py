"""Replay: completions of earlier cycles, learnt from again (arXiv 2508.17000, section 7.1).

What never changes is kept: tokens, scores, the reference's log-probabilities, and those of the policy that sampled, mu.
Policy and value function read a completion anew when it is drawn, so its lambda-errors are of now, with the trace
min(clip, pi / mu) of now. Completions of one prompt are drawn together, without replacement in one pass: all with the
same probability, or in proportion to the mean of |A| over their tokens when they were last read (plus a hundredth of
the mean over all, so that none is lost for good). These proportions are not corrected for: they say which completions
count, and A has its mean of 0 at the fixed point wherever it is looked at.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batches import Sequence
from .experience import positions
from .statistics import per_completion

FLOOR = 0.01  # of the mean priority, added to each
COLUMNS = ("truncated", "scores", "ref_logprobs", "sampler_logprobs")


@dataclass
class Sampled:
    """S completions with N trained tokens, and what stays true of them whatever the policy learns."""

    sequences: list[Sequence]
    truncated: Tensor  # bool [S]
    scores: Tensor  # fp32 [S], as the reward functions gave them
    ref_logprobs: Tensor  # fp32 [N]
    sampler_logprobs: Tensor | None  # fp32 [N]; None where nothing is corrected for

    def __post_init__(self) -> None:
        self.rows = torch.tensor([s.rows for s in self.sequences])

    def select(self, indices: Tensor) -> Sampled:
        """Some of the completions, in that order."""
        at = positions(self.rows, indices)
        assert self.sampler_logprobs is not None
        sequences = [self.sequences[i] for i in indices.tolist()]
        per_token = (self.ref_logprobs[at], self.sampler_logprobs[at])
        return Sampled(sequences, self.truncated[indices], self.scores[indices], *per_token)

    def to(self, device: torch.device | str) -> Sampled:
        columns = (None if c is None else c.to(device) for c in (getattr(self, name) for name in COLUMNS))
        return Sampled(self.sequences, *columns)  # type: ignore[arg-type]


def joined(parts: Many[Sampled]) -> Sampled:
    columns = (torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS)
    return Sampled([s for part in parts for s in part.sequences], *columns)


@dataclass
class Entry:
    """A cycle in the memory."""

    sampled: Sampled  # on the CPU
    cycle: int
    priorities: Tensor  # fp64, one for each prompt


class Memory:
    """The completions of the last ``cycles`` cycles of this process, ``size`` to a prompt."""

    def __init__(self, cycles: int, size: int) -> None:
        self._entries: deque[Entry] = deque(maxlen=cycles)
        self._size = size

    def __len__(self) -> int:
        """How many prompts there are."""
        return sum(len(entry.priorities) for entry in self._entries)

    def add(self, sampled: Sampled, errors: Tensor, cycle: int) -> None:
        """Keeps a cycle, and lets go of the oldest."""
        sampled = sampled.to("cpu")
        self._entries.append(Entry(sampled, cycle, self._priorities(errors, sampled.rows)))

    def draw(self, number: int, generator: torch.Generator, *, prioritised: bool) -> Tensor:
        """Places of ``number`` different prompts, int64, for ``take`` and ``refresh``."""
        weights = torch.cat([entry.priorities for entry in self._entries])
        weights = weights + FLOOR * weights.mean() if prioritised and weights.sum() > 0 else torch.ones_like(weights)
        return torch.multinomial(weights, number, replacement=False, generator=generator)

    def take(self, places: Tensor) -> tuple[Sampled, Tensor]:
        """(the completions at some places, in that order, the cycle that sampled each)."""
        whole = joined([entry.sampled for entry in self._entries])
        cycles = torch.cat([torch.full((len(e.sampled.sequences),), e.cycle) for e in self._entries])
        indices = (places[:, None] * self._size + torch.arange(self._size)).flatten()
        return whole.select(indices), cycles[indices]

    def refresh(self, places: Tensor, errors: Tensor, rows: Tensor) -> None:
        """Gives places the priorities of the errors they have now, fp32 [N]; ``rows`` are tokens of each completion."""
        whole = torch.cat([entry.priorities for entry in self._entries])
        whole[places] = self._priorities(errors, rows)
        for entry, part in zip(self._entries, whole.split([len(e.priorities) for e in self._entries]), strict=True):
            entry.priorities = part.clone()

    def _priorities(self, errors: Tensor, rows: Tensor) -> Tensor:
        """The mean of |A| over the tokens of each prompt's completions."""
        sizes = per_completion(errors.abs().double().cpu(), rows).view(-1, self._size).sum(1)
        return sizes / rows.view(-1, self._size).sum(1).clamp(min=1)

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        entries = [
            {
                "sequences": [list(s) for s in entry.sampled.sequences],
                **{name: getattr(entry.sampled, name) for name in COLUMNS},
                "cycle": entry.cycle,
                "priorities": entry.priorities,
            }
            for entry in self._entries
        ]
        return {"size": self._size, "entries": entries}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes ``state`` up; warns, and forgets it, where a prompt had another number of completions."""
        self._entries.clear()
        if state["size"] != self._size:
            warnings.warn(
                f"resume_from_checkpoint: num_generations was {state['size']} and is {self._size} now, so nothing of "
                "the replay memory in it can be drawn; it begins anew",
                stacklevel=2,
            )
            return
        for kept in state["entries"]:
            sequences = [Sequence(*s) for s in kept["sequences"]]
            sampled = Sampled(sequences, *(kept[name] for name in COLUMNS))
            self._entries.append(Entry(sampled, kept["cycle"], kept["priorities"]))
