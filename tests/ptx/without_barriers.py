"""Takes the barriers out of each compiled kernel one by one: the machine must report every one as missing.

python without_barriers.py         prints "N barriers, each missed", or exits with 1 and names those that are not
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import machine_plugin  # noqa: F401  (installs the machine)
import torch
from ptx_machine import Fault

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
    Terms,
)
from klq_kernels.vocabulary.metrics import klq_metrics
from klq_kernels.vocabulary.sampling import Entries, Sampling

device: Any = import_module("device")
BARRIER = 2  # the kind of an instruction (ptx_machine.Instruction)
N, VOCAB = 2, 40_000
LARGE = (60_000, 150_000)  # segments of one block of row_select, and of two, the last by other warps than read them
SHAPE = LossShape(0.3, 0.8, "double_clipped", 1.0, 0.2, 0.2)


def kernels() -> dict[str, Callable[[], object]]:
    """A launch of every kernel whose threads talk to each other."""

    def module(name: str) -> ModuleType:
        return import_module(f"klq_kernels.backends.triton.{name}")

    def rows(dtype: torch.dtype, vocab: int = VOCAB) -> torch.Tensor:
        return torch.randn(N, row_stride(vocab)).to(dtype)[:, :vocab]

    def columns(count: int, n: int = N) -> list[torch.Tensor]:
        return list(torch.randn(count, n))

    actions, head = torch.tensor([1, VOCAB - 1]), {"scale": 1.0, "softcap": None}
    fp32, half = rows(torch.float32), rows(torch.bfloat16)
    n = 3000
    ends, out = torch.tensor([0, 1100, n], dtype=torch.int32), torch.empty(n)

    def update() -> None:
        top, log_total, logp, *rest = columns(11)
        values, old_logp, old_values, advantages, weights, *three = rest
        module("row_update").row_update(
            rows(torch.bfloat16), actions, Terms(logp, values, old_logp, old_values, advantages, weights),
            Statistics(top, log_total, logp, None), Residuals(*three), grad_scale=torch.tensor(1.0), shape=SHAPE,
            scale=1.0,
        )  # fmt: skip

    def select(vocab: int) -> None:
        logits = rows(torch.bfloat16, vocab)
        pull = Pull(logits.float().amax(1), torch.full((N,), 8.0), torch.ones(N), -torch.ones(N))
        sampling = Sampling(32, torch.tensor(1))
        pull, selection = Entries(N, vocab, sampling).selection(slice(0, N), pull, torch.full((N,), -8.0), 1.0)
        module("row_select").row_select(logits, actions, pull, selection, **head)

    def divergence(backward: bool) -> None:
        pair = Pair(1.0, None, 1.0, None, False)
        if backward:
            out = fp32.view(torch.bfloat16)[:, :VOCAB]
            found = Divergence(*columns(5))
            module("row_kl").row_kl_grad(fp32, rows(torch.float32), found, torch.ones(N), out, pair=pair)
        else:
            module("row_kl").row_kl(rows(torch.bfloat16), rows(torch.bfloat16), Divergence(*columns(5)), pair=pair)

    def dots() -> None:
        hidden, weight = (torch.randn(rows, 300).to(torch.bfloat16) for rows in (N, 40))
        chosen = Chosen(States(hidden, torch.tensor([1, 0])), torch.tensor([[3, 9, 0], [7, 2, 1]]), 4)
        logits, slopes = torch.empty(2, N, 3, 4)
        module("selected_logits").selected_logits(
            chosen, weight, torch.randn(40), logits, slopes, scale=1.0, softcap=9.0
        )

    def scan(masked: bool) -> None:
        mask = torch.rand(n) < 0.8 if masked else None
        module("scans").reverse_scan(torch.randn(n), torch.rand(n), mask, ends, out)

    def errors() -> None:
        terms = ScanTerms(*columns(4, n), None)
        module("scans").lambda_errors(terms, torch.zeros(2), None, ends, out, tau=0.1, gamma=0.9, lam=0.9)

    def metrics() -> None:
        logp, values, old_logp, old_values, advantages, ref = columns(6, n)
        terms = Terms(logp, values, old_logp, old_values, advantages, None)
        klq_metrics(module("klq_metrics"), torch.tensor(1.0), terms, SHAPE, ref_logp=ref)

    return {
        "row_stats": lambda: module("row_stats").row_stats(
            rows(torch.bfloat16), actions, Statistics(*columns(4)), **head
        ),
        "row_grad, narrower": lambda: module("row_grad").row_grad(
            fp32, actions, Pull(*columns(4)), fp32.view(torch.bfloat16)[:, :VOCAB], **head
        ),
        "row_grad, summed over rows": lambda: module("row_grad").row_grad(
            half, actions, Pull(*columns(4)), half, torch.zeros(VOCAB), **head
        ),
        "row_update": update,
        "row_kl": lambda: divergence(False),
        "row_kl_grad, narrower": lambda: divergence(True),
        "selected_logits": dots,
        "row_select": lambda: [select(vocab) for vocab in LARGE],
        "reverse_scan": lambda: scan(False),
        "reverse_scan, masked": lambda: scan(True),
        "lambda_errors": errors,
        "klq_metrics": metrics,
    }


def notices(launch: Callable[[], object]) -> bool:
    """Whether the machine reports anything in this launch."""
    programs = device.STATE["programs"].values()
    for hazards in (device.STATE["hazards"], *(program.hazards for program in programs)):
        hazards.clear()
    try:
        launch()
    except Fault:
        return True
    return bool(device.STATE["hazards"])


def main() -> int:
    taken, unnoticed = 0, []
    for name, launch in kernels().items():
        device.STATE["programs"].clear()
        launch()
        code = [instruction for program in device.STATE["programs"].values() for instruction in program.code]
        barriers = [instruction for instruction in code if instruction.kind == BARRIER]
        for number, barrier in enumerate(barriers, 1):
            barrier.kind, barrier.run = 0, lambda mask: None
            taken += 1
            if not notices(launch):
                unnoticed.append(f"{name}: barrier {number} of {len(barriers)}, line {barrier.line}")
            barrier.kind, barrier.run = BARRIER, None
        if notices(launch):
            unnoticed.append(f"{name}: reported with all its barriers")
    print(f"{taken} barriers, each missed" if not unnoticed else "\n".join(unnoticed))
    return len(unnoticed) > 0 or taken == 0


if __name__ == "__main__":
    os.environ.setdefault("KLQ_BACKEND", "triton")
    sys.exit(main())
