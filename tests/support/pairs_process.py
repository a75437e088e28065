"""DPO on as many processes as torchrun starts: python pairs_process.py FOLDER. The policy goes to FOLDER/final."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import torch

from klq_kernels.trainer import leave_process_group
from klq_kernels.trainer.relatives import DPOConfig, DPOTrainer


def run(folder: Path, **changes: object) -> DPOTrainer:
    """Four steps of eight pairs each on however many processes ``changes`` make up for, and an evaluation."""
    rows = [
        {**row, "chosen": "bdfhj"[: 2 + i % 4], "rejected": "acegi"[: 1 + i % 5]}
        for i, row in enumerate(tiny.prompts(24))
    ]
    settings: dict[str, object] = {
        "loss": "tdpo2", "per_device_train_batch_size": 4, "per_device_eval_batch_size": 5, "max_steps": 4,
        "learning_rate": 1e-3, "logging_steps": 4, "save_strategy": "no", "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    args = DPOConfig(str(folder), **{**settings, **changes})  # type: ignore[arg-type]
    trainer = DPOTrainer(tiny.model(), args, rows, rows[:11], tiny.tokenizer())
    trainer.train()
    trainer.evaluate()
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    trainer = run(folder)
    trainer.save_model(str(folder / "final"))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(folder / "final" / "state.json"))
    del trainer
    leave_process_group()
