"""The figures that the README quotes, in one command: ``python -m bench.readme_numbers``.

Memory of the loss and its gradients at N=2048, H=1024, V=128256, fused against naive; and time on a CPU, of the loss
and of scoring, at N=1024, H=1024, V=50304, ours against what PyTorch offers. All of it in fp32 and bf16. Writes
bench/results/cpu_memory.json and cpu_time.json, which docs/benchmarks.md shows.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from klq_kernels.vocabulary import chunking

from . import memory, report
from .environment import ROOT, describe
from .planner_accuracy import accuracy
from .session import run_task
from .shapes import DTYPES, Shape
from .tasks import TASKS

COMMAND = "python -m bench.readme_numbers"
TIMED = (
    "klq_kernels", "naive", "naive, fp32 logits", "torch.compile", "chunked autograd", "chunked",
    "F.linear_cross_entropy",
)  # fmt: skip
CPU = torch.device("cpu")


def memory_shapes(tiny: bool) -> list[Shape]:
    n, h, v = (64, 32, 4096) if tiny else (2048, 1024, 128_256)
    return [Shape("memory", n, h, v, DTYPES[name]) for name in ("fp32", "bf16")]


def time_shapes(tiny: bool) -> list[Shape]:
    n, h, v = (64, 32, 4096) if tiny else (1024, 1024, 50_304)
    return [Shape("time", n, h, v, DTYPES[name]) for name in ("fp32", "bf16")]


def memory_figures(tiny: bool) -> dict[str, Any]:
    """Measured peaks over the inputs, those over inputs and gradients, and what the planner says to both."""
    shapes = memory_shapes(tiny)
    rows = accuracy(shapes, CPU)
    for row in rows:
        shape = next(s for s in shapes if s.dtype_name == row["shape"]["dtype"])
        gradients = (shape.tokens + shape.vocab) * shape.hidden * shape.dtype.itemsize
        row["gradient_bytes"] = gradients
        measured = row["measured_bytes"]
        row["beyond_gradients_bytes"] = measured - gradients if isinstance(measured, int) else None
        row["workspace_bytes"] = chunking.CPU_WORKSPACE
    return {
        "schema": report.SCHEMA,
        "preset": "cpu_memory",
        "environment": describe(CPU, COMMAND),
        "planner": rows,
        "results": [],
    }


def time_figures(tiny: bool, rounds: int, seconds: float) -> dict[str, Any]:
    records = []
    for task in (TASKS["loss"], TASKS["logprobs"]):
        chosen = replace(task, contenders=[c for c in task.contenders if c.name in TIMED])
        records += run_task(
            chosen, list(time_shapes(tiny)), CPU, rounds=rounds, seconds=seconds, with_memory=True,
            limit=memory.available(), say=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
    return report.document(records, describe(CPU, COMMAND), preset="cpu_time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--only", choices=("memory", "time"), help="half of it")
    given = parser.parse_args()
    if given.only != "time":
        report.save_json(given.out / "cpu_memory.json", memory_figures(given.tiny))
    if given.only != "memory":
        report.save_json(given.out / "cpu_time.json", time_figures(given.tiny, 3 if given.tiny else 9, 60.0))


if __name__ == "__main__":
    main()
