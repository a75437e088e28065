"""One of two training processes that share a server: engine_process.py URL FOLDER; its log is FOLDER/RANK.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny

from klq_kernels.trainer import leave_process_group


def main(url: str, folder: str) -> None:
    settings = {"engine": "vllm", "engine_url": url, "max_steps": 6, "num_update_epochs": 2, "logging_steps": 1}
    run = tiny.trainer(Path(folder), learning_rate=1e-2, per_device_train_batch_size=4, **settings)
    run.train()
    (Path(folder) / f"{run.args.process_index}.json").write_text(json.dumps(run.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_process_group()
