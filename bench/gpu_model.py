"""What every path does on a GPU, by a model: its launches, the bytes it moves, its FLOP, and the time these should take.

    python -m bench.gpu_model            print the page
    python -m bench.gpu_model --write    write docs/gpu-model.md

A path is a list of steps, and a step has three formulas: how often it is launched, what all its launches together read
and write in global memory, and the FLOP of its matrix product. ``STEPS`` is the model: the page prints its formulas,
and the figures are these formulas' values. A number per token is left out wherever [n, V], [n, H] or [V, H] moves.

Time is the roofline of each step: its FLOP at the rate of the products or its bytes at the rate of memory, whichever
takes longer. The fp32 sums of dW are the exception. A product that adds to them reads and writes 8 bytes for every 2 H
FLOP of a row, in bursts at the end of each tile, and how much of that hides behind the product is not known without a
measurement. So there are two figures: all of it hidden, and none.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from klq_kernels.backends.triton.launch import SCAN
from klq_kernels.lab.display import markdown_table
from klq_kernels.vocabulary import chunking

from .environment import ROOT

PAGE = ROOT / "docs" / "gpu-model.md"
GPU = torch.device("cuda")
FLOP_PER_SECOND, BYTES_PER_SECOND = 790e12, 3.35e12
# H100 SXM: ``row_update`` needs a row of logits for each multiprocessor in this much of the L2 cache
MULTIPROCESSORS, CACHE = 132, 0.8 * 50 * 2**20
LOSSES = ("from targets", "on-policy", "head frozen", "no gradient")
PATHS = (*LOSSES, "log-probs", "log-probs, backward")


class Call(NamedTuple):
    """One call. Hidden states are bf16; the weight is bf16 or, as the trainer keeps it, fp32."""

    path: str
    tokens: int
    hidden: int
    vocab: int
    fp32_logits: bool = False
    fp32_weight: bool = False
    bias: bool = False
    entropy: bool = False
    workspace_bytes: int | None = None

    @property
    def learns_weight(self) -> bool:
        return self.path in ("from targets", "on-policy", "log-probs, backward")

    @property
    def rows(self) -> int:
        """Rows of logits per chunk."""
        logits = torch.float32 if self.fp32_logits else torch.bfloat16
        room = chunking.rows_for_accumulator(self.hidden, logits, torch.bfloat16, GPU) if self.learns_weight else 0
        return chunking.chunk_rows(self.tokens, self.vocab, logits, GPU, self.workspace_bytes, room=room)

    @property
    def updates(self) -> bool:
        """Whether one kernel does all that lies between the first product and the others (``row_update``)."""
        fits = chunking.row_stride(self.vocab) * 2 * MULTIPROCESSORS <= CACHE
        plain = not (self.fp32_logits or self.entropy)
        return self.path in ("from targets", "head frozen") and plain and fits

    @property
    def symbols(self) -> dict[str, int]:
        """The numbers that the formulas are written in."""
        chunks = math.ceil(self.tokens / self.rows)
        return {
            "n": self.tokens,
            "H": self.hidden,
            "V": self.vocab,
            "c": chunks,
            "e": 4 if self.fp32_logits else 2,
            "s": 2 if chunks == 1 and not self.fp32_weight else 4,
            "g": 4 if self.fp32_weight else 2,
            "t": 1 if self.rows <= SCAN.sizes["TILE"] else 2,
        }


class Step(NamedTuple):
    """One step. Formulas are sums of products of ``Call.symbols``, factors side by side; "" is 0."""

    name: str
    launch: str  # the kernel, or PyTorch's operator
    where: Callable[[Call], bool]
    launches: str
    bytes: str = ""
    flop: str = ""
    sums: str = ""  # bytes of the fp32 sums of dW, or of dW itself


def on(*paths: str) -> Callable[[Call], bool]:
    return lambda call: call.path in paths


def apart(*paths: str) -> Callable[[Call], bool]:
    """In these paths, where ``row_update`` does not do it."""
    return lambda call: call.path in paths and not call.updates


GRADIENTS = ("from targets", "on-policy", "head frozen", "log-probs, backward")
STEPS = (
    Step("weight rounded for the products", "_to_copy", lambda call: call.fp32_weight, "1", "6 V H"),
    Step("product 1: logits", "mm", lambda call: not call.bias, "c", "2 n H + 2 c V H + e n V", "2 n V H"),
    Step("product 1, with a bias", "addmm", lambda call: call.bias, "c", "2 n H + 2 c V H + e n V", "2 n V H"),
    Step("statistics, loss and gradient of a row", "row_update", lambda call: call.updates, "c", "4 n V"),
    Step("statistics of a row", "row_stats", apart(*LOSSES, "log-probs"), "c", "e n V"),
    Step("lambda-errors", "lambda_errors", on("on-policy"), "t c"),
    Step("loss of a token", "klq_residual", apart(*LOSSES), "c"),
    Step("its gradient, negated", "neg", apart("from targets", "on-policy", "head frozen"), "c"),
    Step("gradient by the logits", "row_grad", apart(*GRADIENTS), "c", "e n V + 2 n V"),
    Step("product 2: gradient of hidden states", "mm", on(*GRADIENTS), "c", "2 n V + 2 c V H + 2 n H", "2 n V H"),
    Step("its rows put in place", "copy_", lambda call: on(*GRADIENTS)(call) and call.symbols["c"] > 1, "c", "4 n H"),
    Step(
        "product 3: gradient of the weight", "addmm", lambda call: call.learns_weight, "c", "2 n V + 2 n H", "2 n V H",
        "2 c s V H - s V H",
    ),
    Step("denominator, sum and mean of the loss", "small", on(*LOSSES), "7"),
    Step("ends of sequences", "small", on("on-policy"), "7"),
    Step("metrics", "klq_metrics", on(*LOSSES), "1"),
    Step("normaliser, or its gradient", "small", on("log-probs", "log-probs, backward"), "1"),
    Step("backward: the incoming scalar", "small", on("from targets", "on-policy", "head frozen"), "1"),
    Step("backward: hidden states and values by 1", "scale", on("from targets", "on-policy", "head frozen"), "2"),
    Step("backward: weight by 1", "scale", on("from targets", "on-policy"), "1", "rounded (s V H + g V H)"),
    Step(
        "gradient of the weight rounded", "_to_copy",
        lambda call: call.path == "log-probs, backward" and call.symbols["s"] > call.symbols["g"], "1", "s V H + g V H",
    ),
)  # fmt: skip


def value(formula: str, call: Call) -> int:
    """What a formula comes to; factors that stand side by side are multiplied."""
    symbols = call.symbols
    symbols["rounded"] = int(symbols["s"] != symbols["g"])
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula)
    return int(eval(product, {"__builtins__": {}}, symbols)) if formula else 0


def steps(call: Call) -> Iterator[Step]:
    return (step for step in STEPS if step.where(call))


class Totals(NamedTuple):
    """A call's sums over its steps, and its seconds with the sums of dW hidden behind their product or not at all."""

    launches: int
    bytes: int
    flop: int
    hidden_seconds: float
    full_seconds: float


def totals(call: Call) -> Totals:
    launches = moved = flop = 0
    hidden = full = 0.0
    for step in steps(call):
        rest, sums, work = (value(f, call) for f in (step.bytes, step.sums, step.flop))
        launches, moved, flop = launches + value(step.launches, call), moved + rest + sums, flop + work
        busy = work / FLOP_PER_SECOND
        hidden += max(busy, (rest + sums) / BYTES_PER_SECOND)
        apart = sums if sums and call.symbols["s"] == 4 else 0
        full += max(busy, (rest + sums - apart) / BYTES_PER_SECOND) + apart / BYTES_PER_SECOND
    return Totals(launches, moved, flop, hidden, full)


def three_products(call: Call) -> float:
    """Seconds of the three products of all n rows in bf16, by the same rates: what the ratios are over."""
    n, width, vocab = call.tokens, call.hidden, call.vocab
    moved = 2 * (n * width + vocab * width + n * vocab)
    return 3 * max(2 * n * vocab * width / FLOP_PER_SECOND, moved / BYTES_PER_SECOND)


# (tokens, hidden, vocabulary), and what the loss with all its gradients may take over the three products
BARS = {
    (8192, 4096, 128_256): 1.07,
    (8192, 4096, 151_936): 1.07,
    (16_384, 2048, 248_320): 1.13,
    (512, 4096, 128_256): 1.15,
}

HEAD = """# The GPU path by a model

**Every figure on this page is a prediction of a model; none was measured on a GPU.** The model counts what is launched
and what must move, and divides by the two rates of a data sheet. It knows nothing of launch latency, tails of waves,
clocks or caches. `python -m bench.gpu_model --write` writes the page; tests hold its launches against those that
Triton's own launcher makes and those that the code makes on a stand-in for a GPU, and its bytes against the tensors
that these are passed (tests/bench/test_gpu_model.py). What was measured on one GPU is in [benchmarks.md](benchmarks.md).

## Steps

`n` valid tokens, `H` the hidden size, `V` the vocabulary, `c` chunks of logits, `e` bytes of a logit (2, or 4 with
`logits_dtype=torch.float32`), `g` bytes of a number of the weight (2, or 4 for an fp32 weight), `s` bytes of a number
of its gradient as it is summed (2 where one chunk of bf16 logits needs no fp32 sums, else 4), `t` launches of a scan (1
up to {tile:,} tokens, 2 beyond), `rounded` is 1 where `s` and `g` differ, else 0. Hidden states and products are bf16. Bytes
and FLOP are those of all launches of the step together. A step without bytes moves a few numbers per token. `small` stands
for PyTorch's operators on a few numbers per token, sequence or call.

{steps}

A scan of `reverse_scan`, `gae`, `lambda_returns` or `klq_targets` is `t` launches over all its tokens. Up to {tile:,}
tokens it reads its inputs once and writes its output once; beyond, it reads the inputs twice.
The sampled gradient has [a model of its own](sampled-gradient.md).

## Time

A step takes its FLOP at {flops:.0f} TFLOP/s or its bytes at {bandwidth:.2f} TB/s, whichever is longer. *Hidden* lets the fp32 sums
of the weight's gradient move behind their product as well; *in full* adds their time to it. The truth lies between: on
the GPU on record a call cut into 8 chunks in place of 1 took longer by most of what *in full* says. Where there are no
fp32 sums the two agree. Ratios are over the three products of all tokens at once by the same rates. A weight in bf16:

{figures}

Bars are for the loss with all its gradients. {verdict}

An fp32 weight is rounded for the products in every call, and fp32 logits are twice the bytes:

{variants}
"""


def step_rows() -> list[list[str]]:
    def code(formula: str) -> str:
        return f"`{formula}`" if formula else ""

    rows = []
    for step in STEPS:
        moved = " + ".join(f for f in (step.bytes, step.sums) if f)
        rows.append([step.name, f"`{step.launch}`", code(step.launches), code(moved), code(step.flop), places(step)])
    return rows


def places(step: Step) -> str:
    """Which paths have the step, of calls that need every one of them."""
    shapes = ((8192, 4096, 128_256), (16_384, 2048, 248_320))
    found = [p for p in PATHS if any(step.where(Call(p, *s, fp32_weight=w, bias=b)) for s in shapes for w in (False, True) for b in (False, True))]
    return "all" if len(found) == len(PATHS) else "; ".join(found)


def figures(call: Call) -> list[str]:
    found, floor = totals(call), three_products(call)
    return [
        f"{call.tokens:,} × {call.hidden:,} × {call.vocab:,}", call.path, str(call.symbols["c"]), str(found.launches),
        f"{found.bytes / 1e9:.2f}", f"{found.flop / 1e12:.2f}", f"{found.hidden_seconds * 1e3:.2f}",
        f"{found.full_seconds * 1e3:.2f}", f"{found.hidden_seconds / floor:.3f}", f"{found.full_seconds / floor:.3f}",
    ]  # fmt: skip


COLUMNS = ("n × H × V", "path", "chunks", "launches", "GB", "TFLOP", "ms, hidden", "ms, in full", "ratio, hidden")


def main() -> None:
    pass
