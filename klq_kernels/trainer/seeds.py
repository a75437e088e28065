"""Randomness as a function of where a run is, not of how it got there.

Each use of randomness (the samples of a cycle, the order of its mini-batches, a sampled gradient) draws from a
generator seeded with (seed, purpose, place in the run, process). So a run that was killed and resumed, or one that was
evaluated in between, goes on with the same samples as one that was not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, unique

import numpy as np
import torch


@unique
class Purpose(IntEnum):
    """The purpose of a stream of random numbers."""

    ROLLOUT = 0
    SHUFFLE = 1
    EVALUATION = 2
    GRADIENT = 3
    REPLAY = 4
    CUT = 5
    REST = 6
    HEAD = 7
    VALUES = 8


def derived_seed(seed: int, purpose: Purpose, *where: int) -> int:
    """A 63-bit seed for one stream; streams of different arguments are independent.

    The length of the place is part of it, because a ``SeedSequence`` pads with zeros: (2,) and (2, 0) would be one.
    """
    state = np.random.SeedSequence([seed, int(purpose), len(where), *where]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators seeded for a while, and then as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
