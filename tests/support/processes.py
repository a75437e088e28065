"""Python in a process of its own, or in two that make a torch.distributed group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TWO_PROCESSES = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
ROOT = Path(__file__).parents[2]


def start(arguments: list[str], expect: int = 0) -> str:
    """The output of ``python ARGUMENTS``, which has to exit with ``expect``."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout
