"""Runs the kernels' tests under Triton's interpreter, which has to be switched on before Triton is first imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.lengthy
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled here, and test_kernels.py runs as it is"
)
@pytest.mark.parametrize(
    ("file", "which", "least"),
    [
        ("kernels/test_kernels.py", "cpu", 100),
        ("core/test_returns.py", "triton-cpu and not long", 15),
        ("core/test_sharded.py", "padded_with", 0),
    ],
)
def test_every_kernel_under_the_interpreter(file: str, which: str, least: int) -> None:
    tests = Path(__file__).parents[1]
    # tests that take a place choose their backend themselves
    environment = os.environ | {"TRITON_INTERPRET": "1", "HYPOTHESIS_PROFILE": "few", "KLQ_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests / file), "-k", which]
    done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > least
