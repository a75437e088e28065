"""How well warps use the memory that they touch, counted by the PTX machine (tests/ptx), without a GPU.

    python -m bench.coalescing               print the table
    python -m bench.coalescing --write       record it in bench/results/coalescing.json
    python -m bench.coalescing --check       compare with the record; exit 1 where anything got worse

Each kernel is compiled for sm_90 as it ships and run on a few shapes. Global memory moves in sectors of 32 bytes, so an
access of a warp costs the sectors that it touches, and the least for its bytes is their number over 32, rounded up: a
remainder of a few elements cannot fill a sector, and is not held against a kernel. ``used`` is the least over what was
touched, of all accesses, and ``below`` names the arguments that use less than 0.95 of their own sectors. ``REASONS``
says of each kernel whose ``used`` is less why that is so. A sector that two instructions ask for counts twice, though
a cache may have it for the second.

Shared memory has 32 banks of 4 bytes. ``wavefronts`` is the least number of rounds for the words of all accesses, over
the rounds that their conflicts make of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from klq_kernels.backends.triton import launch
from klq_kernels.vocabulary.chunking import row_stride
from klq_kernels.vocabulary.chunks import (
    Chosen,
    Divergence,
    LossShape,
    Pair,
    Pull,
    Residuals,
    ScanTerms,
    States,
    Statistics,
    Sums,
    Terms,
)
from klq_kernels.vocabulary.metrics import klq_metrics
from klq_kernels.vocabulary.sampling import Entries, Sampling

RECORD = Path(__file__).parent / "results" / "coalescing.json"
MACHINE = Path(__file__).parents[1] / "tests" / "ptx"
ENOUGH = 0.95
SLACK = 0.005  # of random masks and choices
Table = dict[str, dict[str, dict[str, Any]]]
SHAPE = LossShape(0.3, 0.8, "double_clipped", 1.0, 0.2, 0.2)
HEAD = {"scale": 1.0, "softcap": None}
ACTIONS = torch.tensor([1, 100])
PAIR = Pair(1.0, None, 1.0, None, False)
TWICE = (
    "a thread writes 8 neighbours of 16 bits at once, and so reads 8 of fp32 by two accesses of 16 bytes; each touches "
    "half of a sector, whose other half the next one asks for"
)
UNALIGNED = "where the width is no multiple of 16, rows of the matrix begin inside a sector and accesses are narrow"
REASONS = {
    "row_grad, narrower: V=40000": TWICE,
    "scale: n=100000 float32": TWICE,
    **{
        f"{name}: H={width} bfloat16": UNALIGNED
        for name in ("weighted_sums", "selected_logits")
        for width in (1500, 1501)
    },
}
Launch = Callable[[], object]


def module(name: str) -> ModuleType:
    return import_module(f"klq_kernels.backends.triton.{name}")


def rows(dtype: torch.dtype, vocab: int, n: int = 2) -> Tensor:
    """Logits as the loop over chunks lays them out: rows at multiples of 64 elements."""
    return torch.randn(n, row_stride(vocab)).to(dtype)[:, :vocab]


def columns(count: int, n: int) -> list[Tensor]:
    """Vectors, each in memory of its own."""
    return [torch.randn(n) for _ in range(count)]


def of_rows() -> Iterator[tuple[str, str, Launch]]:
    """Launches of the kernels over rows of logits."""
    for vocab, dtype in ((40_000, torch.bfloat16), (40_000, torch.float32), (131, torch.bfloat16)):
        shape, logits, ref = f"V={vocab} {str(dtype)[6:]}", rows(dtype, vocab), rows(dtype, vocab)
        yield "row_stats", shape, partial(stats, logits)
        yield "row_grad", shape, partial(grad, logits, logits)
        yield "row_grad_sums", shape, partial(grad, logits, logits, torch.zeros(vocab))
        yield "row_kl", shape, partial(divergence, logits, ref)
        yield "row_kl_grad", shape, partial(divergence_grad, logits, ref)
    wide = rows(torch.float32, 40_000)
    yield "row_grad, narrower", "V=40000", partial(grad, wide, wide.view(torch.bfloat16)[:, :40_000])
    yield "row_update", "V=40000 bfloat16", partial(update, rows(torch.bfloat16, 40_000))
    yield "row_select", "V=60000 bfloat16", partial(select, rows(torch.bfloat16, 60_000))
    for width in (1536, 1500, 1501):
        yield "weighted_sums", f"H={width} bfloat16", partial(sums, width)
        yield "selected_logits", f"H={width} bfloat16", partial(dots, width)


def stats(logits: Tensor) -> None:
    module("row_stats").row_stats(logits, ACTIONS, Statistics(*columns(4, 2)), **HEAD)


def grad(logits: Tensor, out: Tensor, column_sums: Tensor | None = None) -> None:
    module("row_grad").row_grad(logits, ACTIONS, Pull(*columns(4, 2)), out, column_sums, **HEAD)


def divergence(logits: Tensor, ref: Tensor) -> None:
    module("row_kl").row_kl(logits, ref, Divergence(*columns(5, 2)), pair=PAIR)


def divergence_grad(logits: Tensor, ref: Tensor) -> None:
    module("row_kl").row_kl_grad(logits, ref, Divergence(*columns(5, 2)), torch.ones(2), logits, pair=PAIR)


def update(logits: Tensor) -> None:
    top, log_total, logp, values, old_logp, old_values, advantages, weights, *out = columns(11, 2)
    module("row_update").row_update(
        logits, ACTIONS, Terms(logp, values, old_logp, old_values, advantages, weights),
        Statistics(top, log_total, logp, None), Residuals(*out), grad_scale=torch.tensor(1.0), shape=SHAPE, scale=1.0,
    )  # fmt: skip


def select(logits: Tensor) -> None:
    n, vocab = logits.shape
    pull = Pull(logits.float().amax(1), torch.full((n,), 8.0), torch.ones(n), -torch.ones(n))
    entries = Entries(n, vocab, Sampling(32, torch.tensor(1)))
    pull, selection = entries.selection(slice(0, n), pull, torch.full((n,), -8.0), 1.0)
    module("row_select").row_select(logits, ACTIONS, pull, selection, **HEAD)


def sums(width: int) -> None:
    ends = torch.tensor([3, 10, 50])
    begins = torch.tensor([0, 3, 10])
    index = torch.randint(30, (50,)).int()
    module("weighted_sums").weighted_sums(
        Sums(begins, ends, index, torch.randn(50)), torch.randn(30, width).to(torch.bfloat16),
        torch.empty(3, width, dtype=torch.bfloat16),
    )  # fmt: skip


def dots(width: int) -> None:
    hidden, weight = torch.randn(4, width).to(torch.bfloat16), torch.randn(200, width).to(torch.bfloat16)
    out = torch.empty(2, 4, 32, 1)
    chosen = Chosen(States(hidden, None), torch.randint(200, (4, 32)), 1)
    module("selected_logits").selected_logits(chosen, weight, torch.randn(200), *out, scale=1.0, softcap=9.0)


def of_tokens() -> Iterator[tuple[str, str, Launch]]:
    """Launches of the kernels over tokens: whole blocks, and ends of blocks of a multiple of 16 and of none."""
    for n in (4096, 3008, 3001, 100):
        yield "klq_residual", f"n={n}", partial(residual, n)
        yield "klq_metrics", f"n={n}", partial(metrics, n)
        for dtype in (torch.float32, torch.bfloat16):
            for masked in (False, True):
                shape = f"n={n} {str(dtype)[6:]}{' mask' if masked else ''}"
                yield "reverse_scan", shape, partial(scan, n, dtype, masked)
                yield "lambda_errors", shape, partial(errors, n, dtype, masked)
    for dtype in (torch.float32, torch.bfloat16):
        yield "scale", f"n=100000 {str(dtype)[6:]}", partial(scale, 100_000, dtype)


def residual(n: int) -> None:
    module("klq_residual").klq_residual(
        Terms(*columns(6, n)), Residuals(*columns(3, n)), grad_scale=torch.tensor(1.0), shape=SHAPE
    )


def metrics(n: int) -> None:
    logp, values, old_logp, old_values, advantages, ref = columns(6, n)
    terms = Terms(logp, values, old_logp, old_values, advantages, None)
    klq_metrics(
        module("klq_metrics"), torch.tensor(1.0), terms, SHAPE, ref_logp=ref, entropy=columns(1, n)[0],
        decay_next=torch.full((n,), 0.9),
    )  # fmt: skip


def sequences(n: int, masked: bool) -> tuple[Tensor | None, Tensor]:
    """(mask, where sequences begin and end)."""
    return torch.rand(n) < 0.8 if masked else None, torch.tensor([0, n // 3, n], dtype=torch.int32)


def scan(n: int, dtype: torch.dtype, masked: bool) -> None:
    delta, decay = (x.to(dtype) for x in columns(2, n))
    module("scans").reverse_scan(delta, decay, *sequences(n, masked), torch.empty(n))


def errors(n: int, dtype: torch.dtype, masked: bool) -> None:
    """As a trainer calls it: log-probabilities and values of the given dtype, rewards in fp32."""
    logp, ref_logp, values = (x.to(dtype) for x in columns(3, n))
    terms = ScanTerms(logp, ref_logp, values, torch.randn(n), None)
    module("scans").lambda_errors(
        terms, torch.zeros(2), *sequences(n, masked), torch.empty(n), tau=0.1, gamma=0.9, lam=0.9
    )


def scale(n: int, dtype: torch.dtype) -> None:
    module("scale").scale(torch.randn(n).to(dtype), torch.tensor(0.5), torch.empty(n, dtype=torch.bfloat16))


class Counts:
    """What the launches since its making asked for: by argument sectors and the least, and wavefronts and the least."""

    def __init__(self) -> None:
        self.sectors: dict[str, tuple[int, int]] = {}
        self.wavefronts = (0, 0)

    def note(self, meta: Any, program: Any, memory: Any, used: Any, grid: Any) -> None:
        """The machine calls it after each launch."""
        for name, (_, touched, least) in memory.traffic.items():
            before = self.sectors.get(name, (0, 0))
            self.sectors[name] = (before[0] + touched, before[1] + least)
        self.wavefronts = (self.wavefronts[0] + program.waves[0], self.wavefronts[1] + program.waves[1])

    def row(self, reason: str | None) -> dict[str, Any]:
        touched, least = (sum(column) for column in zip(*self.sectors.values(), strict=True))
        each = {name: fraction(*counts) for name, counts in self.sectors.items()}
        out = {
            "used": fraction(touched, least),
            "sectors": touched,
            "below": {name: used for name, used in each.items() if used < ENOUGH},
            "wavefronts": fraction(*self.wavefronts),
        }
        return out if reason is None else {**out, "reason": reason}


def fraction(touched: int, least: int) -> float:
    return round(least / touched, 3) if touched else 1.0


def measure(only: str = "") -> Table:
    """By kernel and shape: what its warps use of the sectors and wavefronts that they ask for."""
    sys.path.insert(0, str(MACHINE))
    device: Any = import_module("device")
    machine: Any = import_module("ptx_machine")
    device.install(90, machine.Options(stats=True))
    torch.set_num_threads(1)
    out: Table = {}
    for kernel, shape, start in (*of_rows(), *of_tokens()):
        if only in kernel:
            counts = Counts()
            device.STATE["log"] = counts.note
            torch.manual_seed(0)
            start()
            out.setdefault(kernel, {})[shape] = counts.row(REASONS.get(f"{kernel}: {shape}"))
    return out


def complaints(table: Table, recorded: Table) -> list[str]:
    """What uses less than is enough without a reason, and what got worse than the record."""
    out = []
    for kernel, shapes in table.items():
        for shape, row in shapes.items():
            name = f"{kernel}: {shape}"
            if row["used"] < ENOUGH and name not in REASONS:
                out.append(f"{name} uses {row['used']} of its sectors: {row['below']}")
            if row["used"] >= ENOUGH and name in REASONS:
                out.append(f"{name} uses {row['used']} of its sectors and needs no reason")
            if row["wavefronts"] < ENOUGH:
                out.append(f"{name} has bank conflicts: {row['wavefronts']} of its wavefronts are needed")
            then = recorded.get(kernel, {}).get(shape)
            if then is None:
                out.append(f"{name} is not in the record; run python -m bench.coalescing --write")
            elif row["used"] < then["used"] - SLACK:
                out.append(f"{name}: used fell from {then['used']} to {row['used']}")
    return out


def is_current(record: dict[str, Any]) -> bool:
    """Whether the record was made from these sources by this compiler, which gives the same counts again."""
    return bool(record["sources"] == sources() and record["triton"] == triton.__version__)


def sources() -> str:
    """A digest of what the record depends on beside the compiler: the kernels, the machine, and this file."""
    machine = [MACHINE / "device.py", MACHINE / "ptx_machine.py"]
    files = [*sorted(Path(launch.__file__).parent.glob("*.py")), *machine, Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def show(table: Table) -> None:
    print(f"{'kernel':20}{'shape':26}{'used':>8}{'wavefronts':>12}  below {ENOUGH}")
    for kernel, shapes in table.items():
        for shape, row in shapes.items():
            below = ", ".join(f"{name} {used}" for name, used in row["below"].items())
            print(f"{kernel:20}{shape:26}{row['used']:8.3f}{row['wavefronts']:12.3f}  {below}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record the table")
    parser.add_argument("--check", action="store_true", help="compare with the recorded table")
    parser.add_argument("--only", default="", help="kernels whose name has this in it")
    arguments = parser.parse_args()
    table = measure(arguments.only)
    show(table)
    if arguments.write:
        record = {"triton": triton.__version__, "sources": sources(), "kernels": table}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.check:
        found = complaints(table, json.loads(RECORD.read_text())["kernels"])
        print("\n".join([*found, f"{sum(map(len, table.values()))} launches, {len(found)} complaints"]))
        return len(found) > 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
