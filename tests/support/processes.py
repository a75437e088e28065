"""Python in a process of its own, or in two that make a torch.distributed group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TWO_PROCESSES = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
ROOT = Path(__file__).parents[2]


DEEPSPEED = ROOT / ".venv" / "deepspeed"  # where the Makefile installs it


def start(arguments: list[str], expect: int = 0, *, deepspeed: bool = False) -> str:
    """The output of ``python ARGUMENTS``, which has to exit with ``expect``."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH"), str(DEEPSPEED) if deepspeed else None]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if deepspeed:
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout
