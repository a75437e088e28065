"""The CPU backend's bars: ratios of medians measured side by side in one process, and whether they are met.

    python -m bench.native_bars [--rounds 9] [--threads 2] [--only head-bf16,head-fp32,large-bf16,scan] [--output FILE]

Every contender is held against float64 before it is timed. Contenders take turns, so that a machine that slows down
slows all of them. The products and the naive loss are those of the other benchmarks (``tasks``, ``contenders``).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from klq_kernels import klq_targets, native, reverse_scan

from . import environment, report
from .contenders import Call, Contender, Outputs, ours, plain, scans
from .harness import Gate, Record, take_turns
from .inputs import HeadInputs, head_inputs, scan_inputs
from .shapes import Scan, Shape
from .tasks import TASKS, Task, one_gemm, three_gemms

CPU = torch.device("cpu")
OUTPUT = Path(__file__).parent / "results" / "native_bars.json"


class Bar(NamedTuple):
    """``value`` must not pass ``limit``; where ``at_least``, not fall below it."""

    name: str
    value: float
    limit: float
    unit: str = "x"
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


class Section(NamedTuple):
    """Calls that take turns, and the bars made of their medians in ms."""

    calls: dict[str, Call]
    bars: Callable[[dict[str, float]], list[Bar]]


def checked(task: Task, contender: Contender, inputs: Any, dtype: torch.dtype) -> Call:
    """The contender's call, once its answer has been held against float64. Raises RuntimeError where it is wrong."""
    record = Record(task.name, contender.name, contender.computes, "ok", "", "", "", {})
    Gate(task, inputs, dtype).check(contender, record)
    if record.status != "ok":
        raise RuntimeError(f"{contender.name}: {record.note}")
    return contender.make(inputs)


def with_valid(inputs: HeadInputs, share: float) -> HeadInputs:
    """The same tokens with all but a random share of them masked out."""
    mask = torch.rand(inputs.actions.numel(), generator=torch.Generator().manual_seed(1)) < share
    return replace(inputs, mask=mask, rows=mask.nonzero().squeeze(1))


def head(shape: Shape, gemm_bar: float) -> Section:
    """Loss forward and backward, and log-probabilities, against the products alone and against naive PyTorch."""
    inputs = head_inputs(shape, CPU)
    loss, logprobs = TASKS["loss"], TASKS["logprobs"]
    calls = {
        "fused": checked(loss, Contender("fused", ours.fused), inputs, shape.dtype),
        "three GEMMs": three_gemms(inputs),
        "naive": plain.loss_through(plain.naive_logprobs, inputs),
        "fused, 25% valid": ours.fused(with_valid(inputs, 0.25)),
        "logprobs": checked(logprobs, Contender("logprobs", ours.score), inputs, shape.dtype),
        "one GEMM": one_gemm(inputs),
    }

    def bars(ms: dict[str, float]) -> list[Bar]:
        at = f"{shape.dtype_name} {shape.tokens}x{shape.hidden}x{shape.vocab}"
        return [
            Bar(f"{at}: fused loss / three GEMMs", ms["fused"] / ms["three GEMMs"], gemm_bar),
            Bar(f"{at}: fused loss / naive", ms["fused"] / ms["naive"], 0.75 if shape.dtype_name == "bf16" else 1.0),
            Bar(f"{at}: fused loss, 25% valid / all", ms["fused, 25% valid"] / ms["fused"], 0.32),
            Bar(f"{at}: linear_logprobs / one GEMM", ms["logprobs"] / ms["one GEMM"], 1.10),
        ]

    return Section(calls, bars)


def scan(threads: int) -> Section:
    """Scans at 512 x 4096, one packed trajectory of 131,072 tokens, and what plain PyTorch does with the same."""
    batch, length, long = 512, 4096, 131_072
    inputs = scan_inputs(Scan("bar", batch, length), CPU)
    delta, decay = torch.randn(batch, length), torch.rand(batch, length)
    mask, ends = torch.rand(long) > 0.25, torch.tensor([0, long], dtype=torch.int32)
    columns = (inputs.logprobs, inputs.ref_logprobs, inputs.values, inputs.rewards)
    logprobs, reference, values, rewards = (t.reshape(-1)[:long] for t in columns)
    out, flat, tail = torch.empty(long), delta.reshape(-1)[:long], torch.zeros(1)
    row = flat.reshape(1, -1)

    def compute() -> Outputs:
        native.lambda_errors(
            logprobs, reference, values, rewards, None, tail, mask, ends, out, tau=0.05, gamma=1.0, lam=0.95
        )
        return {}

    def targets() -> Outputs:
        klq_targets(logprobs, reference, values, rewards, mask=mask, cu_seqlens=ends)
        return {}

    def call(function: Callable[[], object]) -> Call:
        def outputs() -> Outputs:
            function()
            return {}

        return outputs

    task = TASKS["targets"]
    calls = {
        "reverse_scan": call(lambda: reverse_scan(delta, decay)),
        "klq_targets": checked(task, Contender("klq_targets", ours.targets), inputs, torch.float32),
        "loop": scans.targets_by(scans.loop, inputs),
        "compiled": checked(
            task, Contender("compiled", lambda x: scans.targets_by(scans.compiled_doubling, x)), inputs, torch.float32
        ),
        "trajectory, compute": compute,
        "trajectory, klq_targets": targets,
        "trajectory, reverse_scan": call(lambda: reverse_scan(row, 0.95)),
        "trajectory, loop": call(lambda: scans.loop(row, 0.95)),
    }

    def bars(ms: dict[str, float]) -> list[Bar]:
        per_element = 1e6 * threads / (batch * length)
        return [
            Bar("reverse_scan 512x4096", ms["reverse_scan"] * per_element, 0.5, "ns per element and thread"),
            Bar("klq_targets 512x4096", ms["klq_targets"] * per_element, 0.5, "ns per element and thread"),
            Bar("packed trajectory of 131072, masked, compute", ms["trajectory, compute"], 0.2, "ms"),
            Bar("klq_targets / compiled doubling", ms["klq_targets"] / ms["compiled"], 1.0),
            Bar("Python loop / klq_targets, 512x4096", ms["loop"] / ms["klq_targets"], 500, at_least=True),
            Bar(
                "Python loop / reverse_scan, 1x131072",
                ms["trajectory, loop"] / ms["trajectory, reverse_scan"], 500, at_least=True,
            ),
        ]  # fmt: skip

    return Section(calls, bars)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="head-bf16,head-fp32,large-bf16,scan")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sections: dict[str, Callable[[], Section]] = {
        "head-bf16": lambda: head(Shape("bar", 1024, 1024, 50_304), 1.12),
        "head-fp32": lambda: head(Shape("bar", 1024, 1024, 50_304, torch.float32), 1.06),
        "large-bf16": lambda: head(Shape("bar", 2048, 1024, 128_256), 1.12),
        "large-fp32": lambda: head(Shape("bar", 2048, 1024, 128_256, torch.float32), 1.06),
        "scan": lambda: scan(arguments.threads),
    }
    bars: list[Bar] = []
    medians: dict[str, dict[str, float]] = {}
    for name in arguments.only.split(","):
        section = sections[name]()
        samples = take_turns(section.calls, CPU, arguments.rounds, float("inf"))
        medians[name] = {call: statistics.median(taken) for call, taken in samples.items()}
        for bar in section.bars(medians[name]):
            bars.append(bar)
            sign = ">=" if bar.at_least else "<="
            print(f"{'met ' if bar.met else 'MISS'} {bar.name}: {bar.value:.3f} {bar.unit} ({sign} {bar.limit})")
    environs = environment.describe(CPU, "python -m bench.native_bars") | {"isa": native.use_isa()}
    results = [bar._asdict() | {"met": bar.met} for bar in bars]
    document = {"rounds": arguments.rounds, "environment": environs, "bars": results, "median_ms": medians}
    report.save_json(arguments.output, document)


if __name__ == "__main__":
    main()
