"""Rollouts that are sampled ahead: the next cycle's completions, while the trainer learns from those of this one.

A cycle begins in this order:

    1. the trainer waits for the completions that were sampled for it
    2. the engine gets the policy's weights, which have not learnt from these completions yet
    3. the engine begins on the completions of the next cycle, in a thread of its own
    4. the trainer scores and learns

So an engine never gets weights while it samples, and what it sampled is one cycle old when it is learnt: the weights
behind it are those of the beginning of the cycle before. Nothing is ahead of the first cycle, which is sampled as it
begins. Whatever else asks the engine for something, and every checkpoint, waits first; a checkpoint holds the
completions, since the weights that sampled them are gone when it is resumed from.

The thread runs what ``begin`` of a rollout function returned (``rollout``) and touches neither the trainer nor torch's
random state. It is a daemon: a program that ends does not wait for it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from ..engines import WeightsLost
from .batches import Sequence
from .processes import together
from .rollout import Completions, Rollout

logger = logging.getLogger(__name__)
COLUMNS = ("truncated", "sampler_logprobs", "staleness")


@dataclass
class Upcoming:
    """A rollout that is being sampled (``rollout`` is None) or has been."""

    cycle: int
    prompts: list[list[int]]  # token ids
    outcome: Future[Completions] | None
    rollout: Rollout | None = None


class Ahead:
    """At most one rollout that is sampled ahead.

    Args:
        accelerator: of the trainer; where one process fails, all do.
        check: makes a rollout of completions for prompts (token ids).
    """

    def __init__(self, accelerator: Any, check: Callable[[Completions, list[list[int]]], Rollout]) -> None:
        self._accelerator, self._check = accelerator, check
        self._upcoming: Upcoming | None = None

    def submit(self, sample: Callable[[], Completions], prompts: list[list[int]], cycle: int) -> None:
        """Begins on the completions of a cycle; there must be no others."""
        assert self._upcoming is None
        self._upcoming = Upcoming(cycle, prompts, in_thread(sample))

    def wait(self) -> None:
        """Returns when nothing is being sampled. Every process must call it.

        What an engine without the right weights was to sample is forgotten, so that its cycle is sampled as it begins.

        Raises:
            Exception: what else the thread raised, with its traceback, once.
        """
        upcoming = self._upcoming
        try:
            with together(self._accelerator):
                if upcoming is not None and upcoming.rollout is None:
                    assert upcoming.outcome is not None
                    upcoming.rollout = self._check(upcoming.outcome.result(), upcoming.prompts)
        except BaseException as error:
            self._upcoming = None
            if not isinstance(error, WeightsLost):
                raise
            logger.warning("async_rollouts: %s; the cycle is sampled as it begins", error)

    def take(self, prompts: list[list[int]], cycle: int) -> Rollout | None:
        """The completions for these prompts, sampled a cycle ago; None where there are none.

        Every process must call it; it raises what ``wait`` does.
        """
        self.wait()
        upcoming, self._upcoming = self._upcoming, None
        if upcoming is None or upcoming.cycle != cycle:
            return None
        if upcoming.prompts != prompts:
            warnings.warn(
                "async_rollouts: the prompts of this cycle are not those that were sampled ahead (has the dataset been "
                "changed?); it is sampled anew",
                stacklevel=2,
            )
            return None
        assert upcoming.rollout is not None
        return aged(upcoming.rollout, 1.0)

    def drop(self) -> None:
        """Forgets what was sampled ahead, once the engine has ended with it, well or not."""
        upcoming, self._upcoming = self._upcoming, None
        if upcoming is not None and upcoming.outcome is not None:
            upcoming.outcome.exception()

    def state(self) -> dict[str, Any] | None:
        """What was sampled ahead, for a checkpoint; ``wait`` first."""
        if self._upcoming is None:
            return None
        rollout = self._upcoming.rollout
        assert rollout is not None
        return {
            "cycle": self._upcoming.cycle,
            "prompts": self._upcoming.prompts,
            "sequences": [list(s) for s in rollout.sequences],
            **{name: getattr(rollout, name) for name in COLUMNS},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes ``state`` up."""
        rollout = Rollout([Sequence(*s) for s in state["sequences"]], **{name: state[name] for name in COLUMNS})
        self._upcoming = Upcoming(state["cycle"], state["prompts"], None, rollout)


def in_thread(work: Callable[[], Completions]) -> Future[Completions]:
    """What ``work`` returns or raises in a thread that no exit of the program waits for."""
    outcome: Future[Completions] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, name="klq rollout", daemon=True).start()
    return outcome


def aged(rollout: Rollout, cycles: float) -> Rollout:
    """The rollout with an age of its sampler's weights, ``cycles`` more than it said (0 where it said nothing)."""
    said: Tensor | None = rollout.staleness
    return replace(rollout, staleness=(torch.zeros(len(rollout.sequences)) if said is None else said) + cycles)
