"""A tiny model evaluated on held-out prompts, on the processes of a launch: python held_out_process.py FILE.

Saves what process 0 found with whole weights and with sharded ones, for ``test_run`` to hold against a single process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch
from fsdp_process import shard

from klq_kernels.trainer import KLQTrainer
from klq_kernels.trainer.evaluation import answers
from klq_kernels.trainer.processes import leave_process_group

NUMBERS = ("1", "3", "5")  # of prompts: fewer than processes, a batch for each process, one more


class Counting(KLQTrainer):
    """Notes how many completions this process samples."""

    sampled = 0

    def roll_out(self, rows: list[dict[str, Any]], seed: int) -> Any:
        self.sampled += len(rows)
        return super().roll_out(rows, seed)


def build(folder: str) -> Counting:
    """Batches of two; many tokens end a completion, so that they are of unequal length."""
    policy = tiny.model()
    policy.generation_config.eos_token_id = [*range(tiny.EOS, 60)]
    config = tiny.arguments(folder, rollout_forward_batch_size=2, max_completion_length=16)
    return Counting(policy, tiny.even, config, tiny.prompts(), processing_class=tiny.tokenizer())


def held_out(trainer: Counting, number: str) -> dict[str, Any]:
    prompts = tiny.prompts(int(number))
    metrics = trainer.evaluate(prompts)
    trainer.sampled = 0
    return {"metrics": metrics, "answers": answers(trainer, list(prompts), 1), "sampled": trainer.sampled}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder)
        found = {"whole": {number: held_out(trainer, number) for number in NUMBERS}}
        shard(trainer.actor_critic)
        found["sharded"] = {number: held_out(trainer, number) for number in NUMBERS}
    if trainer.is_world_process_zero():
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave_process_group()
