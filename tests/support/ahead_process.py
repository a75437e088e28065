"""Runs that sample ahead, in a process of their own or in two: ahead_process.py JSON [JSON ...].

Each JSON has ``folder`` and what is to happen: arguments of ``build`` and of ``run``. A run leaves RANK.json in its
folder: the losses, what the engine was asked for, and the error it ended with.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import tiny
import torch
from own_engine import OwnEngine

from klq_kernels.engines import EngineError, Generated, Request, WeightsLost
from klq_kernels.trainer import EngineRollout, KLQTrainer, leave_process_group

# Of two processes one has an engine that fails: at its start, as it takes weights, as it samples ahead and when called.
FAILURES: dict[str, dict[str, Any]] = {
    "start": {"fails": "start"},
    "weights": {"fails": "take_weights"},
    "weights of both": {"fails": "take_weights", "shared": True, "failing": 0},
    "ahead": {"fails": "generate"},
    "called": {"fails": "generate", "async_rollouts": False, "shared": True},
}


class Troubled(OwnEngine):
    """Its method ``fails`` fails in the second cycle (``start``: at once). A ``file`` gives all the same weights."""

    def __init__(self, rank: int, fails: str | None, *, file: Path | None, stuck: bool) -> None:
        super().__init__()
        self.file, self.stuck, self.rank, self.fails = file, stuck, rank, fails
        self.shared = file is not None

    def _fail(self, method: str) -> None:
        if method == self.fails:
            raise EngineError(f"engine of {self.rank} broke")

    def start(self, model: Any) -> Any:
        self._fail("start")
        return super().start(model)

    def take_weights(self, weights: Any, version: str) -> None:
        if self.versions and self.fails == "take_weights":
            next(iter(weights))
            self._fail("take_weights")
        given = [(name, weight.detach().clone()) for name, weight in weights]
        super().take_weights(given, version)
        if self.file is not None:
            torch.save(given, self.file)

    def generate(self, request: Request, version: str) -> Generated:
        if len(self.requests) == 2:  # after the probe and the first cycle
            self._fail("generate")
            if self.fails == "lost":
                self.fails = None
                raise WeightsLost("it was restarted")
            if self.stuck:
                threading.Event().wait()
        if self.file is not None and self.rank > 0:
            super().take_weights(torch.load(self.file), version)
        return super().generate(request, version)


class Killed(KLQTrainer):
    """Dies in the middle of an update."""

    kill_at: int | None = None
    stuck = False
    _seen = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self._seen += 1
        if self._seen == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.stuck:
            raise KeyboardInterrupt
        return super().compute_loss(*args, **kwargs)


def build(
    folder: Path,
    *,
    fails: str | None = None,
    failing: int = 1,
    shared: bool = False,
    stuck: bool = False,
    async_rollouts: bool = True,
) -> Killed:
    """A trainer on this process's engine; that of the process ``failing`` ``fails``."""
    torch.set_num_threads(1)
    args = tiny.arguments(
        folder, async_rollouts=async_rollouts, max_steps=6, num_update_epochs=2, logging_steps=1, learning_rate=3e-2,
        save_strategy="steps", save_steps=3, per_device_train_batch_size=4, max_completion_length=4,
    )  # fmt: skip
    rank = args.process_index
    folder.mkdir(exist_ok=True)
    engine = Troubled(
        rank, fails if rank == failing else None, file=folder / "weights.pt" if shared else None, stuck=stuck
    )
    trainer = Killed(
        tiny.model(), tiny.even, args, tiny.prompts(), processing_class=tiny.tokenizer(),
        rollout_func=EngineRollout(engine),
    )  # fmt: skip
    trainer.stuck = stuck
    return trainer


def run(folder: Path, *, kill_at: int | None = None, resume: str | None = None, **told: Any) -> None:
    trainer = build(folder, **told)
    trainer.kill_at = kill_at
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    rollout: Any = trainer.rollout_func
    found = {
        "losses": tiny.losses(trainer),
        "asked": [(r.prompt_ids, r.seeds) for r in rollout.engine.requests[1:]],
        "error": error,
    }
    (folder / f"{trainer.args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    for told in map(json.loads, sys.argv[1:]):
        run(Path(told.pop("folder")), **told)
    leave_process_group()
