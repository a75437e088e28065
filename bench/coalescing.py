"""How well warps use the memory that they touch, counted by the PTX machine (tests/ptx), without a GPU.

    python -m bench.coalescing               print the table
    python -m bench.coalescing --write       record it in bench/results/coalescing.json
    python -m bench.coalescing --check       compare with the record; exit 1 where anything got worse

Each kernel is compiled for sm_90 as it ships and run on a few shapes. Global memory moves in sectors of 32 bytes, so an
access of a warp costs the sectors that it touches, and the least for its bytes is their number over 32, rounded up: a
remainder of a few elements cannot fill a sector, and is not held against a kernel. ``used`` is the least over what was
touched, of all accesses. Every argument that uses less than 0.95 of its own sectors is named with its fraction, and
``REASONS`` says why that stays. A cache may still serve a half-used sector twice: this counts requests.

Shared memory has 32 banks of 4 bytes. ``wavefronts`` is the least number of rounds for the words of all accesses, over
the rounds that their conflicts make of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
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
SHAPE = LossShape(0.3, 0.8, "double_clipped", 1.0, 0.2, 0.2)
HEAD = {"scale": 1.0, "softcap": None}
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
    actions = torch.tensor([1, 100])
    for vocab, dtype in ((40_000, torch.bfloat16), (40_000, torch.float32), (131, torch.bfloat16)):
        shape, logits = f"V={vocab} {str(dtype)[6:]}", rows(dtype, vocab)
        ref, pair = rows(dtype, vocab), Pair(1.0, None, 1.0, None, False)
        statistics, pull = Statistics(*columns(4, 2)), Pull(*columns(4, 2))
        yield "row_stats", shape, lambda z=logits, s=statistics: module("row_stats").row_stats(z, actions, s, **HEAD)
        yield "row_grad", shape, lambda z=logits, p=pull: module("row_grad").row_grad(z, actions, p, z, **HEAD)
        yield (
            "row_kl",
            shape,
            lambda z=logits, r=ref: module("row_kl").row_kl(
                z, r, Divergence(*columns(5, 2)), pair=Pair(1.0, None, 1.0, None, False)
            ),
        )
        yield (
            "row_kl_grad",
            shape,
            lambda z=logits, r=ref: module("row_kl").row_kl_grad(
                z, r, Divergence(*columns(5, 2)), torch.ones(2), z, pair=pair
            ),
        )
    wide = rows(torch.float32, 40_000)
    narrow = wide.view(torch.bfloat16)[:, :40_000]
    yield (
        "row_grad, narrower",
        "V=40000",
        lambda: module("row_grad").row_grad(wide, actions, Pull(*columns(4, 2)), narrow, **HEAD),
    )
    yield "row_update", "V=40000 bfloat16", lambda: update(rows(torch.bfloat16, 40_000), actions)
    yield "row_select", "V=60000 bfloat16", lambda: select(rows(torch.bfloat16, 60_000), actions)
    for width in (1536, 1500, 1501):
        yield "weighted_sums", f"H={width} bfloat16", lambda width=width: sums(width)
        yield "selected_logits", f"H={width} bfloat16", lambda width=width: dots(width)


def update(logits: Tensor, actions: Tensor) -> None:
    top, log_total, logp, values, old_logp, old_values, advantages, weights, *out = columns(11, 2)
    module("row_update").row_update(
        logits, actions, Terms(logp, values, old_logp, old_values, advantages, weights),
        Statistics(top, log_total, logp, None), Residuals(*out), grad_scale=torch.tensor(1.0), shape=SHAPE, scale=1.0,
    )  # fmt: skip


def select(logits: Tensor, actions: Tensor) -> None:
    n, vocab = logits.shape
    pull = Pull(logits.float().amax(1), torch.full((n,), 8.0), torch.ones(n), -torch.ones(n))
    entries = Entries(n, vocab, Sampling(32, torch.tensor(1)))
    pull, selection = entries.selection(slice(0, n), pull, torch.full((n,), -8.0), 1.0)
    module("row_select").row_select(logits, actions, pull, selection, **HEAD)


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
        yield (
            "klq_residual",
            f"n={n}",
            lambda n=n: module("klq_residual").klq_residual(
                Terms(*columns(6, n)), Residuals(*columns(3, n)), grad_scale=torch.tensor(1.0), shape=SHAPE
            ),
        )
        yield "klq_metrics", f"n={n}", lambda n=n: metrics(n)
        ends = torch.tensor([0, n // 3, n], dtype=torch.int32)
        for dtype in (torch.float32, torch.bfloat16):
            for masked in (False, True):
                shape = f"n={n} {str(dtype)[6:]}{' mask' if masked else ''}"
                mask = torch.rand(n) < 0.8 if masked else None
                a, b = (x.to(dtype) for x in columns(2, n))
                yield (
                    "reverse_scan",
                    shape,
                    lambda a=a, b=b, mask=mask, ends=ends, n=n: module("scans").reverse_scan(
                        a, b, mask, ends, torch.empty(n)
                    ),
                )
                yield "lambda_errors", shape, lambda a=a, mask=mask, ends=ends, n=n: errors(n, a, mask, ends)
    for n, dtype in ((100_000, torch.float32), (100_000, torch.bfloat16)):
        yield (
            "scale",
            f"n={n} {str(dtype)[6:]}",
            lambda n=n, dtype=dtype: module("scale").scale(
                torch.randn(n).to(dtype), torch.tensor(0.5), torch.empty(n, dtype=torch.bfloat16)
            ),
        )


def metrics(n: int) -> None:
    logp, values, old_logp, old_values, advantages, ref = columns(6, n)
    terms = Terms(logp, values, old_logp, old_values, advantages, None)
    klq_metrics(
        module("klq_metrics"), torch.tensor(1.0), terms, SHAPE, ref_logp=ref, entropy=columns(1, n)[0],
        decay_next=torch.full((n,), 0.9),
    )  # fmt: skip


def errors(n: int, logp: Tensor, mask: Tensor | None, ends: Tensor) -> None:
    """As a trainer calls it: log-probabilities and values of the given dtype, rewards in fp32."""
    terms = ScanTerms(logp, logp.clone(), logp.clone(), torch.randn(n), None)
    module("scans").lambda_errors(terms, torch.zeros(2), mask, ends, torch.empty(n), tau=0.1, gamma=0.9, lam=0.9)


def fraction(least: int, touched: int) -> float:
    return round(least / touched, 3) if touched else 1.0


def measure(only: str = "") -> dict[str, dict[str, dict[str, Any]]]:
    """By kernel and shape: what its warps use of the sectors and wavefronts that they ask for."""
    sys.path.insert(0, str(MACHINE))
    device: Any = import_module("device")
    machine: Any = import_module("ptx_machine")
    device.install(90, machine.Options(stats=True))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for make in (of_rows, of_tokens):
        for kernel, shape, start in make():
            if only not in kernel:
                continue
            traffic: dict[str, list[int]] = {}
            waves = [0, 0]

            def note(meta: Any, program: Any, memory: Any, used: Any, grid: Any, traffic=traffic, waves=waves) -> None:
                for name, counts in memory.traffic.items():
                    so_far = traffic.setdefault(name, [0, 0, 0])
                    so_far[:] = [x + y for x, y in zip(so_far, counts, strict=True)]
                waves[:] = [x + y for x, y in zip(waves, program.waves, strict=True)]

            device.STATE["log"] = note
            start()
            _, touched, least = (sum(column) for column in zip(*traffic.values(), strict=True))
            by_argument = {name: fraction(most, all_) for name, (_, all_, most) in traffic.items()}
            out.setdefault(kernel, {})[shape] = {
                "used": fraction(least, touched),
                "sectors": touched,
                "below": {name: used for name, used in by_argument.items() if used < ENOUGH},
                "wavefronts": fraction(waves[1], waves[0]),
            }
    return out


def sources() -> str:
    """A digest of what the record depends on beside the compiler: the kernels, the machine, and this file."""
    files = [*sorted(Path(launch.__file__).parent.glob("*.py")), *sorted(MACHINE.glob("*e.py")), Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def show(table: dict[str, dict[str, dict[str, Any]]]) -> None:
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
