"""KLQ on Ray Train: python examples/launch/ray_train.py --workers 8 (pip install "ray[train]").

Ray starts the processes and joins them to one group; everything else is the trainer's. Storage has to be seen by all
nodes, so that a run that lost a node goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from klq_kernels.lab.tasks import load_task
from klq_kernels.trainer import KLQConfig, KLQTrainer, last_complete_checkpoint


def train(settings: dict[str, Any]) -> None:
    """One worker's run. ``settings`` are arguments of ``KLQConfig``; its output folder is the same for all workers."""
    task = load_task("arithmetic")
    args = KLQConfig(**settings)
    trainer = KLQTrainer(
        task.build_model(0), task.reward_funcs, args,
        train_dataset=task.dataset("train", 4096), processing_class=task.tokenizer(),
    )  # fmt: skip
    folder = Path(str(args.output_dir))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    trainer.save_model(str(folder / "final"))


def main() -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ray"))
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--cpu", action="store_true", help="workers without a GPU")
    given = parser.parse_args()
    settings: dict[str, Any] = {
        "output_dir": str(given.output_dir.resolve()), "max_steps": given.max_steps, "save_steps": 20,
        "use_cpu": given.cpu, "bf16": not given.cpu,
    }  # fmt: skip
    if not given.cpu:
        settings["fsdp"] = True  # sharded over the workers by FSDP2
    TorchTrainer(
        train,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=not given.cpu),
        run_config=RunConfig(storage_path=settings["output_dir"], failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
