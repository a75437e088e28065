"""One of two training processes: engine_process.py FOLDER URL shares a server, without URL it has a vLLM of its own.

Its log is FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny

from klq_kernels.trainer import leave_process_group

SIZES = {"max_model_len": 64, "max_num_seqs": 32, "enforce_eager": True, "kv_cache_memory_bytes": 64 * 2**20}


def main(folder: str, url: str | None = None) -> None:
    settings = {"engine": "vllm", "engine_url": url, "max_steps": 6, "num_update_epochs": 2, "logging_steps": 1}
    if url is None:
        settings["engine_kwargs"] = SIZES
    given = {"model": tiny.model(hidden_size=32 if url else 128)}
    run = tiny.trainer(Path(folder), given, learning_rate=1e-2, per_device_train_batch_size=4, **settings)
    run.train()
    (Path(folder) / f"{run.args.process_index}.json").write_text(json.dumps(run.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_process_group()
