"""A tiny model, prompts and a reward in files, as flags of ``klq train``."""

from __future__ import annotations

import json
from pathlib import Path

import tiny

REWARD = """
calls = 0

def even(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / 8 for ids in completion_ids]

def stops(completion_ids, **_):
    global calls
    calls += 1
    if calls > 2:
        raise KeyboardInterrupt
    return even(completion_ids)
"""
TINY = [
    "--per_device_train_batch_size", "4", "--max_completion_length", "6", "--num_update_epochs", "1", "--use_cpu",
    "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--watch_failures", "False", "--seed", "3",
]  # fmt: skip


def flags(folder: Path) -> list[str]:
    """Flags that name what is written into the folder."""
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "ab" * (1 + i % 3)}) + "\n" for i in range(24)))
    (folder / "rewards.py").write_text(REWARD)
    return [
        "--model", str(folder / "model"), "--dataset", str(folder / "prompts.jsonl"),
        "--reward_function", f"{folder / 'rewards.py'}:even", *TINY,
    ]  # fmt: skip
