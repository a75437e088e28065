"""What warps use of the memory they touch is on record, and enough, as the PTX machine counts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench import coalescing

RECORD = json.loads(coalescing.RECORD.read_text())
KERNELS = RECORD["kernels"]
slow_where_on_record = pytest.mark.slow if coalescing.is_current(RECORD) else lambda test: test


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.coalescing", "--check", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)


def test_the_record_is_of_these_kernels_and_enough() -> None:
    if RECORD["triton"] == coalescing.triton.__version__:
        assert coalescing.is_current(RECORD), "a kernel has changed: python -m bench.coalescing --write"
    assert coalescing.complaints(KERNELS, KERNELS) == []
    rows = {f"{kernel}: {shape}": row for kernel, shapes in KERNELS.items() for shape, row in shapes.items()}
    assert {name: row["reason"] for name, row in rows.items() if "reason" in row} == coalescing.REASONS


def test_a_kernel_uses_what_is_on_record() -> None:
    """One of few accesses; the others in make test-slow, or here where the record is of other sources."""
    done = check("--only", "klq_residual")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 launches, 0 complaints" in done.stdout


@slow_where_on_record
@pytest.mark.timeout(1200)
def test_every_kernel_uses_what_is_on_record() -> None:
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"used": 0.9}, "uses 0.9 of its sectors"),
        ({"wavefronts": 0.3}, "bank conflicts"),
        ({"used": 0.96}, "fell from 1.0"),
    ],
)
def test_what_is_worse_is_found(change: dict[str, float], complaint: str) -> None:
    row = {"used": 1.0, "sectors": 8, "below": {}, "wavefronts": 1.0}
    recorded = {"kernel": {"n=8": row}}
    assert coalescing.complaints(recorded, recorded) == []
    found = coalescing.complaints({"kernel": {"n=8": row | change}}, recorded)
    assert any(complaint in line for line in found)
    [missing] = coalescing.complaints(recorded, {})
    assert "not in the record" in missing
