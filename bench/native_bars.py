"""The CPU backend's bars: ratios of medians measured side by side in one process, and whether they are met.

    python -m bench.native_bars [--rounds 9] [--threads 2] [--only head-bf16,head-fp32,scan,trajectory] [--output FILE]

Whatever gives an answer is held against float64 before it is timed. Contenders take turns, so that a machine that slows
down slows all of them. The products, the naive losses and the other scans are those of the other benchmarks (``tasks``,
``contenders``). Beside the bars stand figures without a limit: what the machine itself, or PyTorch, needs for the same.
Sections named in ``--only`` replace those of their name in the output; the others stay.

glibc gives large blocks back to the system as soon as they are freed, so that every new gradient costs page faults,
in all contenders that return one. With GLIBC_TUNABLES in the environment, which can tell it to keep them (README,
"Limits"), the sections are stored and named apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from klq_kernels import klq_targets, reverse_scan
from klq_kernels.backends import native
from klq_kernels.vocabulary import chunking
from klq_kernels.vocabulary.chunks import ScanTerms, slices
from klq_kernels.vocabulary.products import add_product

from . import environment, memory, oracle, report
from .contenders import Call, Contender, Outputs, ours, plain, scans
from .harness import Gate, Record, errors_of, judge, take_turns
from .inputs import HeadInputs, ScanInputs, head_inputs, scan_inputs
from .shapes import Scan, Shape
from .tasks import TASKS, Task, one_gemm, three_gemms

CPU = torch.device("cpu")
REPEATS = 50
OUTPUT = Path(__file__).parent / "results" / "native_bars.json"


class Bar(NamedTuple):
    """``value`` must not pass ``limit`` (``at_least``: fall below it); without a limit it is for comparison."""

    name: str
    value: float
    limit: float | None = None
    unit: str = "x"
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        verdict = {True: "met ", False: "MISS", None: "    "}[self.met]
        limit = "" if self.limit is None else f" ({'>=' if self.at_least else '<='} {self.limit})"
        return f"{verdict} {self.name}: {self.value:.3f} {self.unit}{limit}"


class Section(NamedTuple):
    """Calls that take turns, and the bars made of their medians in ms."""

    calls: dict[str, Call]
    bars: Callable[[dict[str, float]], list[Bar]]


def checker(task: Task, inputs: Any, dtype: torch.dtype) -> Callable[..., Call]:
    """A function that makes a call on these inputs and raises RuntimeError where its answer is not that of float64."""
    gate = Gate(task, inputs, dtype)

    def checked(make: Callable[[Any], Call], noise: float = 0.0) -> Call:
        contender, record = Contender("", make, noise=noise), Record(task.name, "", "klq", "ok", "", "", "", {})
        gate.check(contender, record)
        call = make(inputs)
        gate.check_whole(contender, record, call())
        if record.status != "ok":
            raise RuntimeError(f"{task.name}: {record.note}")
        return call

    return checked


def matched(call: Call, right: Outputs) -> Call:
    """The call, once what it returns has been held against float64: for scans that no task has."""
    complaint = judge(errors_of(call(), right), {}, torch.float32)
    if complaint is not None:
        raise RuntimeError(complaint)
    return call


def with_valid(inputs: HeadInputs, share: float) -> HeadInputs:
    """The same tokens with all but a random share of them masked out."""
    mask = torch.rand(inputs.actions.numel(), generator=torch.Generator().manual_seed(1)) < share
    return replace(inputs, mask=mask, rows=mask.nonzero().squeeze(1))


def into_fresh_memory(inputs: HeadInputs, *, gradients: bool) -> Call:
    """The products as any call has to make them: into memory that it just got."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()

    def call() -> Outputs:
        logits = torch.mm(hidden, weight.T)
        return {"hidden": logits @ weight, "weight": logits.T @ hidden} if gradients else {}

    return call


def strip_by_strip(inputs: HeadInputs) -> Call:
    """The three products as ``klq_kernels.vocabulary.vocabulary_major`` runs them, into buffers that are reused."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    n, width = hidden.shape
    logits, turned = (hidden.new_zeros(chunking.MOST_ENTRIES * n) for _ in range(2))
    d_hidden, d_weight = torch.zeros(n, width), torch.empty_like(weight)
    parts = slices(weight.shape[0], chunking.MOST_ENTRIES)

    def call() -> Outputs:
        for strip in parts:
            entries = strip.stop - strip.start
            torch.mm(weight[strip], hidden.T, out=logits[: entries * n].view(entries, n))
        for strip in parts:
            entries = strip.stop - strip.start
            add_product(d_hidden, turned[: entries * n].view(n, entries), weight[strip], first=False)
            torch.mm(logits[: entries * n].view(entries, n), hidden, out=d_weight[strip])
        return {}

    return call


def head(shape: Shape, gemm_bar: float) -> Section:
    """Loss forward and backward, and log-probabilities, against the products alone and against naive PyTorch."""
    inputs = head_inputs(shape, CPU)
    quarter = with_valid(inputs, 0.25)
    checked = checker(TASKS["loss"], inputs, shape.dtype)
    calls = {
        "fused": checked(ours.fused),
        "three GEMMs": three_gemms(inputs),
        "three GEMMs, fresh": into_fresh_memory(inputs, gradients=True),
        "three GEMMs, strips": strip_by_strip(inputs),
        "naive": checked(partial(plain.loss_through, plain.naive_logprobs)),
        "naive, fp32 logits": checked(partial(plain.loss_through, plain.fp32_logprobs)),
        "fused, 25% valid": checker(TASKS["loss"], quarter, shape.dtype)(ours.fused),
        "three GEMMs, 25% of the rows": three_gemms(quarter),
        "logprobs": checker(TASKS["logprobs"], inputs, shape.dtype)(ours.score),
        "one GEMM": one_gemm(inputs),
        "one GEMM, fresh": into_fresh_memory(inputs, gradients=False),
    }

    def bars(ms: dict[str, float]) -> list[Bar]:
        at = f"{shape.dtype_name} {shape.tokens}x{shape.hidden}x{shape.vocab}"

        def ratio(name: str, above: str, below: str, limit: float | None = None) -> Bar:
            return Bar(f"{at}: {name}", ms[above] / ms[below], limit)

        naive_bar = 0.75 if shape.dtype_name == "bf16" else 1.0
        return [
            ratio("fused loss / three GEMMs", "fused", "three GEMMs", gemm_bar),
            ratio("three GEMMs into fresh memory / three GEMMs", "three GEMMs, fresh", "three GEMMs"),
            ratio("three GEMMs as the loss runs them / three GEMMs", "three GEMMs, strips", "three GEMMs"),
            ratio("fused loss / naive", "fused", "naive", naive_bar),
            ratio("fused loss / naive with fp32 logits", "fused", "naive, fp32 logits"),
            ratio("fused loss, 25% valid / all", "fused, 25% valid", "fused", 0.32),
            ratio("three GEMMs, 25% of the rows / all", "three GEMMs, 25% of the rows", "three GEMMs"),
            ratio("linear_logprobs / one GEMM", "logprobs", "one GEMM", 1.10),
            ratio("one GEMM into fresh memory / one GEMM", "one GEMM, fresh", "one GEMM"),
        ]

    return Section(calls, bars)


def sampled(shape: Shape, limit: float, frozen_limit: float) -> Section:
    """The loss with a sampled gradient against the three bare products, and its peak memory against the dense loss."""
    inputs = head_inputs(shape, CPU)
    checked = checker(TASKS["loss"], inputs, shape.dtype)
    peaks = [memory.on_cpu("loss", [shape], name)[0] for name in (f"{ours.NAME}, sampled", ours.NAME)]
    calls = {
        "sampled": checked(ours.sampled, noise=ours.NOISE),
        "sampled, frozen head": ours.sampled_for_hidden(inputs),
        "fused": checked(ours.fused),
        "three GEMMs": three_gemms(inputs),
        # not just before the sampled gradient: a virtual machine hands memory that is free for seconds to its host
        "memory": quiet(lambda: native.populate(torch.empty_like(inputs.weight))),
        "one GEMM": one_gemm(inputs),
    }

    def bars(ms: dict[str, float]) -> list[Bar]:
        at, floor = f"{shape.dtype_name} {shape.tokens}x{shape.hidden}x{shape.vocab}", ms["three GEMMs"]
        out = [
            Bar(f"{at}: loss with sampled gradient / three GEMMs", ms["sampled"] / floor, limit),
            Bar(f"{at}: the same, head frozen / three GEMMs", ms["sampled, frozen head"] / floor, frozen_limit),
            Bar(f"{at}: dense loss / three GEMMs", ms["fused"] / floor),
            Bar(f"{at}: one GEMM / three GEMMs", ms["one GEMM"] / floor),
            Bar(f"{at}: fresh memory for the weight's gradient / three GEMMs", ms["memory"] / floor),
        ]
        if all(isinstance(peak, int) for peak in peaks):
            out.append(Bar(f"{at}: peak memory, sampled / dense", peaks[0] / peaks[1], 1.0))  # type: ignore[operator]
        return out

    return Section(calls, bars)


def quiet(function: Callable[[], object]) -> Call:
    """A call whose results are dropped."""

    def call() -> Outputs:
        function()
        return {}

    return call


def repeated(call: Call) -> Call:
    """REPEATS times in a row, for calls so short that waking up, and fetching what the call before it displaced, would
    be most of what is measured.
    """
    return quiet(lambda: [call() for _ in range(REPEATS)])


def once(ms: dict[str, float], whole: tuple[str, ...]) -> dict[str, float]:
    """Times of one call each, ``whole`` naming those that were not repeated."""
    return {name: taken if name in whole else taken / REPEATS for name, taken in ms.items()}


def lambda_errors(inputs: ScanInputs, ends: torch.Tensor) -> Call:
    """``klq_targets`` without what surrounds it: no checks, no allocation, no copies of log-probs and values."""
    columns = (inputs.logprobs, inputs.ref_logprobs, inputs.values, inputs.rewards)
    logp, ref_logp, values, rewards = (t.reshape(-1) for t in columns)
    mask = None if inputs.mask is None else inputs.mask.reshape(-1)
    out, tail = torch.empty(values.numel()), torch.zeros(ends.numel() - 1)
    found = {"advantages": out.view_as(inputs.values)}

    def call() -> Outputs:
        native.lambda_errors(
            ScanTerms(logp, ref_logp, values, rewards, None), tail, mask, ends, out,
            tau=inputs.tau, gamma=inputs.gamma, lam=inputs.lam,
        )  # fmt: skip
        return found

    return call


def into_given(
    delta: torch.Tensor, decay: torch.Tensor, mask: torch.Tensor | None, ends: torch.Tensor, out: torch.Tensor
) -> Call:
    """``reverse_scan`` without what surrounds it."""
    deltas, decays = delta.reshape(-1), decay.reshape(-1)
    masks = None if mask is None else mask.reshape(-1)
    found = {"scan": out.view_as(delta)}

    def call() -> Outputs:
        native.reverse_scan(deltas, decays, masks, ends, out)
        return found

    return call


def scan(threads: int, batch: int = 512, length: int = 4096) -> Section:
    """Scans at 512 x 4096, beside what moving the same bytes takes and what others do with the same inputs.

    The Python loop steps through all 512 sequences at once, so it is only 4096 vector operations long. A bar of 500
    times its speed would be a tenth of the time that the bytes of this shape take; it stands where the loop hurts, at
    one long trajectory (``trajectory``).
    """
    few, at = 8, f"{batch}x{length}"
    inputs, small = (scan_inputs(Scan("bar", rows, length), CPU) for rows in (batch, few))
    delta, decay = torch.randn(batch, length), torch.rand(batch, length)
    ends = torch.arange(batch + 1, dtype=torch.int32) * length
    out = torch.empty(batch * length)
    deltas, decays = delta.reshape(-1), decay.reshape(-1)
    columns = (inputs.logprobs, inputs.ref_logprobs, inputs.values, inputs.rewards)
    gae = checker(TASKS["scan"], inputs, torch.float32)
    targets = checker(TASKS["targets"], inputs, torch.float32)
    right = oracle.reverse_scan(delta, decay)
    contenders = {c.name: c for c in scans.SCAN if c.missing(CPU) is None and c.name != "naive"}
    slow = {
        "loop": targets(partial(scans.targets_by, scans.loop)),
        **{name: gae(c.make) for name, c in contenders.items()},
    }
    calls = {
        "reverse_scan": matched(lambda: {"scan": reverse_scan(delta, decay)}, right),
        "reverse_scan, compute": matched(into_given(delta, decay, None, ends, out), right),
        "delta + decay": lambda: delta + decay,
        "delta + decay, given": lambda: torch.add(deltas, decays, out=out),
        "klq_targets": targets(ours.targets),
        "klq_targets, compute": targets(partial(lambda_errors, ends=ends)),
        "klq_targets, compute, few rows": checker(TASKS["targets"], small, torch.float32)(
            partial(lambda_errors, ends=ends[: few + 1])
        ),
        "bytes of the lambda-errors": lambda: [*(c.sum() for c in columns), out.zero_()],
        "bytes of the targets": lambda: [columns[1].sum(), columns[3].sum(), *(columns[k].clone() for k in (0, 2, 3))],
        "gae": gae(ours.advantages),
    }

    def bars(ms: dict[str, float]) -> list[Bar]:
        ms = once(ms, tuple(slow))

        def each(name: str, call: str, limit: float | None = None, rows: int = batch) -> Bar:
            return Bar(name, ms[call] * 1e6 * threads / (rows * length), limit, "ns per element and thread")

        return [
            each(f"reverse_scan {at}", "reverse_scan", 0.5),
            each(f"reverse_scan {at}, into a given buffer", "reverse_scan, compute", 0.5),
            each(f"delta + decay {at}, PyTorch's own: the same reads and writes", "delta + decay"),
            each(f"delta + decay {at}, into a given buffer", "delta + decay, given"),
            each(f"klq_targets {at}", "klq_targets", 0.5),
            each("clones of its three results, sums of two columns: its reads and writes", "bytes of the targets"),
            each(f"klq_targets {at}, lambda-errors into a given buffer", "klq_targets, compute", 0.5),
            each(
                "sums of its four columns, a fill of the fifth: the same reads and writes", "bytes of the lambda-errors"
            ),
            each(
                f"klq_targets {few}x{length} (in cache), lambda-errors into a given buffer",
                "klq_targets, compute, few rows",
                None,
                few,
            ),
            Bar(f"Python loop / klq_targets, {at}", ms["loop"] / ms["klq_targets"]),
            *(Bar(f"gae / {name}, {at}", ms["gae"] / ms[name], 1.0) for name in contenders),
        ]

    return Section({**slow, **{name: repeated(quiet(call)) for name, call in calls.items()}}, bars)


def trajectory(length: int = 131_072) -> Section:
    """One packed trajectory of 131,072 tokens with a mask, which fits the last-level cache; the loops without one."""
    inputs = scan_inputs(Scan("bar", 1, length), CPU)
    ends = torch.tensor([0, length], dtype=torch.int32)
    columns = (inputs.logprobs, inputs.ref_logprobs, inputs.values, inputs.rewards)
    flat = [t.reshape(-1) for t in columns]
    masked = replace(inputs, mask=torch.rand(1, length) > 0.25)
    delta, out = torch.randn(1, length), torch.empty(length)
    assert masked.mask is not None
    mask, decay = masked.mask.reshape(-1), torch.full((1,), 0.95)
    scanned = oracle.reverse_scan(delta, decay)
    targets, masked_targets = (oracle.advantages(i, log_ratios=True) for i in (inputs, masked))

    def packed() -> Outputs:
        return {"advantages": klq_targets(*flat, mask=mask, cu_seqlens=ends).advantages.view(1, -1)}

    calls = {
        "compute": matched(lambda_errors(masked, ends), masked_targets),
        "scan, compute": matched(
            into_given(delta, decay, masked.mask, ends, out), oracle.reverse_scan(delta, decay, masked.mask)
        ),
        "klq_targets": matched(packed, masked_targets),
        "klq_targets, unmasked": matched(lambda: {"advantages": klq_targets(*columns).advantages}, targets),
        "reverse_scan": matched(lambda: {"scan": reverse_scan(delta, 0.95)}, scanned),
    }
    slow = {
        "loop": matched(lambda: {"scan": scans.loop(delta, 0.95)}, scanned),
        "loop, targets": matched(scans.targets_by(scans.loop, inputs), targets),
    }

    def bars(ms: dict[str, float]) -> list[Bar]:
        ms = once(ms, tuple(slow))
        shape = f"packed trajectory of {length}, masked"
        return [
            Bar(f"{shape}, lambda-errors into a given buffer", ms["compute"], 0.2, "ms"),
            Bar(f"{shape}, reverse_scan into a given buffer", ms["scan, compute"], 0.2, "ms"),
            Bar(f"{shape}, klq_targets", ms["klq_targets"], None, "ms"),
            Bar(f"Python loop / reverse_scan, 1x{length}", ms["loop"] / ms["reverse_scan"], 500, at_least=True),
            Bar(
                f"Python loop / klq_targets, 1x{length}",
                ms["loop, targets"] / ms["klq_targets, unmasked"],
                500,
                at_least=True,
            ),
        ]

    return Section({**slow, **{name: repeated(quiet(call)) for name, call in calls.items()}}, bars)


def written(path: Path) -> dict[str, Any]:
    """The sections that an earlier run left."""
    return json.loads(path.read_text())["sections"] if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="head-bf16,head-fp32,scan,trajectory")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # where AMX makes the first product cheap, what is left weighs more
    bf16_limits = (0.65, 0.65) if torch.cpu._is_amx_tile_supported() else (0.45, 0.42)
    sections: dict[str, Callable[[], Section]] = {
        "head-bf16": lambda: head(Shape("bar", 1024, 1024, 50_304), 1.12),
        "head-fp32": lambda: head(Shape("bar", 1024, 1024, 50_304, torch.float32), 1.06),
        "large-bf16": lambda: head(Shape("bar", 2048, 1024, 128_256), 1.12),
        "large-fp32": lambda: head(Shape("bar", 2048, 1024, 128_256, torch.float32), 1.06),
        **{
            f"sampled{size}-{name}": partial(sampled, Shape("bar", *sizes, dtype), *limits)
            for size, sizes in (("", (1024, 1024, 50_304)), ("-large", (2048, 1024, 128_256)))
            for name, dtype, limits in (("bf16", torch.bfloat16, bf16_limits), ("fp32", torch.float32, (0.40, 0.38)))
        },
        "scan": lambda: scan(arguments.threads),
        "trajectory": trajectory,
    }
    found = written(arguments.output)
    for name in arguments.only.split(","):
        section = sections[name]()
        samples = take_turns(section.calls, CPU, arguments.rounds, float("inf"))
        medians = {call: statistics.median(taken) for call, taken in samples.items()}
        bars = section.bars(medians)
        print(*bars, sep="\n", flush=True)
        tunables = os.environ.get("GLIBC_TUNABLES")
        setting = f"GLIBC_TUNABLES={tunables} " if tunables else ""
        command = f"{setting}python -m bench.native_bars --only {name}"
        found[setting + name] = {
            "rounds": arguments.rounds,
            "environment": environment.describe(CPU, command) | {"isa": native.use_isa()},
            "bars": [bar._asdict() | {"met": bar.met} for bar in bars],
            "median_ms": medians,
        }
        report.save_json(arguments.output, {"sections": found})


if __name__ == "__main__":
    main()
