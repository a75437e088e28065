"""Micro-benchmarks of the row operations of this machine's backend: ``pytest bench --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .breakdown import row_kernels
from .contenders import ours, scans
from .inputs import head_inputs, scan_inputs
from .shapes import Scan, Shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = [Shape("micro", 256, 64, 50_304, dtype) for dtype in (torch.float32, torch.bfloat16)]


def synchronised(call: Any) -> Any:
    """On a GPU a call is over when its kernels are."""

    def run() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("shape", HEADS, ids=lambda s: s.dtype_name)
@pytest.mark.parametrize("kernel", ["statistics", "gradient"])
def test_row_kernel(benchmark: Any, kernel: str, shape: Shape) -> None:
    benchmark(synchronised(row_kernels(head_inputs(shape, DEVICE))[kernel]))


@pytest.mark.parametrize("contender", [*ours.SCAN, *scans.SCAN[:1]], ids=lambda c: c.name)
def test_scan(benchmark: Any, contender: Any) -> None:
    benchmark(synchronised(contender.make(scan_inputs(Scan("micro", 512, 1024), DEVICE))))
