"""What every path does on a GPU, by a model: its launches, bytes and FLOP, and the time that these should take.

    python -m bench.gpu_model            print the page
    python -m bench.gpu_model --write    write docs/gpu-model.md

A path is a list of steps, and a step has three formulas: how often it is launched, what all its launches together read
and write in global memory, and the FLOP of its matrix product. ``STEPS`` is the model: the page prints its formulas,
and the figures are these formulas' values. A number per token is left out wherever [n, V], [n, H] or [V, H] moves.

Time is the roofline of each step: its FLOP at the rate of the products or its bytes at the rate of memory, whichever
takes longer. The fp32 sums of dW are the exception: a product that adds to them reads and writes them at the end of
each tile, and may or may not hide that behind the next tile. So there are two figures: all of it hidden, and none.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch

from klq_kernels.backends.triton.launch import ROW_GRAD_SUMS, SCAN
from klq_kernels.lab.display import markdown_table
from klq_kernels.vocabulary import chunking

from .environment import ROOT

PAGE = ROOT / "docs" / "gpu-model.md"
RECORD = ROOT / "bench" / "results" / "gpu_suite.json"
GPU = torch.device("cuda")
FLOP_PER_SECOND, BYTES_PER_SECOND = 790e12, 3.35e12
# H100 SXM: ``row_update`` needs a row of logits for each multiprocessor in this much of the L2 cache
MULTIPROCESSORS, CACHE = 132, 0.8 * 50 * 2**20
GROUP = ROW_GRAD_SUMS.sizes["ROWS"]
PRODUCT_3 = "_NTT"  # ends the names of cuBLAS's kernels for it
LOSSES = ("from targets", "on-policy", "head frozen", "no gradient")
PATHS = (*LOSSES, "log-probs", "log-probs, backward")


def scan_launches(tokens: int) -> int:
    return 1 if tokens <= SCAN.sizes["TILE"] else 2


class Call(NamedTuple):
    """One call. Hidden states are bf16; the weight is bf16 or, as the trainer keeps it, fp32."""

    path: str
    tokens: int
    hidden: int
    vocab: int
    fp32_logits: bool = False
    fp32_weight: bool = False
    bias: bool = False  # bf16, and learnt with the weight
    entropy: bool = False
    workspace_bytes: int | None = None

    @property
    def learns_weight(self) -> bool:
        return self.path in ("from targets", "on-policy", "log-probs, backward")

    @property
    def learns_bias(self) -> bool:
        return self.bias and self.learns_weight

    @property
    def sums(self) -> bool:
        """Whether the kernel of the gradient by the logits sums it over rows: not where it makes 16 bits of 32."""
        return self.learns_bias and not self.fp32_logits

    @property
    def rows(self) -> int:
        """Rows of logits per chunk."""
        logits = torch.float32 if self.fp32_logits else torch.bfloat16
        room = chunking.rows_for_accumulator(self.hidden, logits, torch.bfloat16, GPU) if self.learns_weight else 0
        return chunking.chunk_rows(self.tokens, self.vocab, logits, GPU, self.workspace_bytes, room=room)

    @property
    def product_adds(self) -> bool:
        """Whether the first product adds the bias; to fp32 logits the row kernels do (``token_major``)."""
        return self.bias and not self.fp32_logits

    @property
    def updates(self) -> bool:
        """Whether one kernel does all that lies between the first product and the others (``row_update``)."""
        fits = chunking.row_stride(self.vocab) * 2 * MULTIPROCESSORS <= CACHE
        plain = not (self.fp32_logits or self.entropy or self.learns_bias)
        return self.path in ("from targets", "head frozen") and plain and fits

    @property
    def symbols(self) -> dict[str, int]:
        """The numbers that the formulas are written in."""
        chunks = math.ceil(self.tokens / self.rows)
        last = self.tokens - (chunks - 1) * self.rows
        s, g = 2 if chunks == 1 and not self.fp32_weight else 4, 4 if self.fp32_weight else 2
        return {
            "n": self.tokens,
            "H": self.hidden,
            "V": self.vocab,
            "c": chunks,
            "k": (chunks - 1) * math.ceil(self.rows / GROUP) + math.ceil(last / GROUP),
            "e": 4 if self.fp32_logits else 2,
            "s": s,
            "g": g,
            "rounded": int(s != g),
            "t": scan_launches(self.rows),
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
    """In these paths."""
    return lambda call: call.path in paths


def apart(*paths: str) -> Callable[[Call], bool]:
    """In these paths, where ``row_update`` does not do it."""
    return lambda call: call.path in paths and not call.updates


def adds(call: Call) -> bool:
    """Whether the first product goes through ``addmm``: with an output in another dtype, or with the bias."""
    return call.fp32_logits or call.product_adds


def plain_gradient(call: Call) -> bool:
    return apart(*GRADIENTS)(call) and not call.sums


def late(call: Call) -> bool:
    """Whether the row kernels add the bias."""
    return call.bias and not call.product_adds


GRADIENTS = ("from targets", "on-policy", "head frozen", "log-probs, backward")
STEPS = (
    Step("weight rounded for the products", "_to_copy", lambda call: call.fp32_weight, "1", "6 V H"),
    Step("product 1: logits", "mm", lambda call: not adds(call), "c", "2 n H + 2 c V H + e n V", "2 n V H"),
    Step(
        "product 1: fp32 logits, or with a bias", "addmm", adds, "c", "2 n H + 2 c V H + e n V",
        "2 n V H",
    ),
    Step("a bias padded for the row kernels, cast where logits are fp32", "small", late, "1 + (e // 4)"),
    Step("statistics, loss and gradient of a row", "row_update", lambda call: call.updates, "c", "4 n V"),
    Step("statistics of a row", "row_stats", apart(*LOSSES, "log-probs"), "c", "e n V"),
    Step("lambda-errors", "lambda_errors", on("on-policy"), "t c"),
    Step("loss of a token", "klq_residual", apart(*LOSSES), "c"),
    Step("its gradient, negated", "small", apart("from targets", "on-policy", "head frozen"), "c"),
    Step("gradient by the logits", "row_grad", plain_gradient, "c", "e n V + 2 n V"),
    Step(
        "gradient by the logits, and its sums over a group of rows", "row_grad_sums", lambda call: call.sums, "c",
        "e n V + 2 n V + 4 k V",
    ),
    Step("product 2: gradient of hidden states", "mm", on(*GRADIENTS), "c", "2 n V + 2 c V H + 2 n H", "2 n V H"),
    Step(
        "product 3: gradient of the weight", "addmm", lambda call: call.learns_weight, "c", "2 n V + 2 n H", "2 n V H",
        "2 c s V H - s V H",
    ),
    Step("gradient of the bias, from those sums", "sum", lambda call: call.sums, "c", "4 k V"),
    Step(
        "gradient of the bias, where logits are fp32", "sum", lambda call: call.learns_bias and call.fp32_logits, "c",
        "2 n V",
    ),
    Step("gradient of the bias, added up", "small", lambda call: call.learns_bias, "1 + c"),
    Step("gradient of the bias rounded", "small", lambda call: call.bias and call.path == "log-probs, backward", "1"),
    Step("denominator, sum and mean of the loss", "small", on(*LOSSES), "6"),
    Step("ends of sequences", "small", on("on-policy"), "4"),
    Step("metrics", "klq_metrics", on(*LOSSES), "1"),
    Step("normaliser, or its gradient", "small", on("log-probs", "log-probs, backward"), "1"),
    Step("unknown tokens made NaN", "small", on("log-probs, backward"), "4"),
    Step("backward: the incoming scalar", "small", on("from targets", "on-policy", "head frozen"), "1"),
    Step("backward: hidden states and values by 1", "scale", on("from targets", "on-policy", "head frozen"), "2"),
    Step(
        "backward: bias by 1", "scale", lambda call: call.bias and call.path in ("from targets", "on-policy"), "1",
    ),
    Step("backward: weight by 1", "scale", on("from targets", "on-policy"), "1", "rounded (s V H + g V H)"),
    Step(
        "gradient of the weight rounded", "_to_copy",
        lambda call: call.path == "log-probs, backward" and call.symbols["s"] > call.symbols["g"], "1", "s V H + g V H",
    ),
)  # fmt: skip


# Scans over n tokens in fp32: launches of the scan, of anything else, and bytes
SCANS = {
    "reverse_scan": ("t", "1", "4 n t + 4 n"),
    "gae, lambda_returns": ("t", "1", "8 n t + 4 n"),
    "klq_targets": ("t", "2", "12 n t + 4 n + 16 n"),
}


def evaluated(formula: str, symbols: dict[str, int]) -> int:
    """What a formula comes to; factors that stand side by side are multiplied."""
    code = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula)
    return int(eval(code, {"__builtins__": {}}, symbols)) if formula else 0


def value(formula: str, call: Call) -> int:
    return evaluated(formula, call.symbols)


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
        added = sums if call.symbols["s"] == 4 else 0  # in bf16 it is the product's own output, written once
        full += max(busy, (rest + sums - added) / BYTES_PER_SECOND) + added / BYTES_PER_SECOND
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

**Predictions of a model, not measurements.** The model counts what is launched and what must move, and divides by the
two rates of a data sheet. It knows nothing of launch latency, waves that are not full, clocks or caches.
`python -m bench.gpu_model --write` writes this page. Tests hold its launches against those that Triton's own launcher
makes and those that the code makes on a stand-in for a GPU, and its bytes against the tensors that these are passed
(tests/bench/test_gpu_model.py). What one GPU took is in [benchmarks.md](benchmarks.md).

## Steps

`n` valid tokens, `H` the hidden size, `V` the vocabulary, `c` chunks of logits; `k` groups of up to {group} rows of a
chunk; `e` bytes of a logit (2, or 4 with `logits_dtype=torch.float32`), `g` bytes of a number of the weight (2, or 4
for an fp32 weight), `s` bytes of a number of its gradient as it is summed (2 where one chunk needs no fp32 sums, else
4); `t` launches of a scan (1 up to {tile:,} tokens, 2 beyond); `rounded` is 1 where `s` and `g` differ, else 0. Hidden
states and products are bf16. Bytes and FLOP are those of all launches of a step together. A step without bytes moves a
few numbers per token. `small` is any of PyTorch's operators on a few numbers per token, sequence or call.

{steps}

Scans of fp32 inputs without a mask, one decay for all tokens, `klq_targets` with a reward per sequence. Of two launches
the first reads the inputs and writes two numbers for each {tile:,} tokens; the second reads them again and writes the
result.

{scans}

The sampled gradient has [a model of its own](sampled-gradient.md).

## Time

A step takes its FLOP at {flops:.0f} TFLOP/s or its bytes at {bandwidth:.2f} TB/s, whichever is longer. *Hidden* lets
the fp32 sums of the weight's gradient, which product 3 reads and writes, move while it multiplies; *in full* adds their
time to it. Without fp32 sums the two agree. Ratios are over the three products of all tokens at once, by the same
rates.

{evidence}

{figures}

{verdict}

An fp32 weight is rounded for the products in every call and has fp32 sums; fp32 logits are twice the bytes. A bias is
added to 16-bit logits by the first product, which costs nothing where the vocabulary is a multiple of 16 (elsewhere
PyTorch writes the bias first and the product reads it back, which is not counted here), and to fp32 logits by the row
kernels. Its gradient is the sum over rows of the gradient by the logits, which is summed as it is written: so a learnt
bias costs the sums of each group, and where targets are given one kernel for each row the read of the logits that it
spares. A gradient in 16 bits by fp32 logits is read once more for its sum.

{variants}
"""
COLUMNS = (
    "n x H x V", "path", "chunks", "launches", "GB", "TFLOP", "ms, hidden", "ms, in full", "ratio, hidden",
    "ratio, in full",
)  # fmt: skip


VARIANTS: dict[str, dict[str, bool]] = {
    "bias": {"bias": True},
    "": {},
    "fp32 weight": {"fp32_weight": True},
    "fp32 logits": {"fp32_logits": True},
}


def step_rows() -> list[list[str]]:
    def code(formula: str) -> str:
        return f"`{formula}`" if formula else ""

    return [
        [
            step.name, f"`{step.launch}`", code(step.launches),
            code(" + ".join(f for f in (step.bytes, step.sums) if f)), code(step.flop), places(step),
        ]
        for step in STEPS
    ]  # fmt: skip


def places(step: Step) -> str:
    """The paths that have the step, in some call."""
    forms = [
        dict(zip(("fp32_logits", "fp32_weight", "bias"), form, strict=True)) for form in product(*[(False, True)] * 3)
    ]
    calls = (Call(path, *shape, **form) for path in PATHS for shape in BARS for form in forms)
    found = dict.fromkeys(call.path for call in calls if step.where(call))
    return "all" if len(found) == len(PATHS) else "; ".join(found)


def row(call: Call) -> list[str]:
    found, floor = totals(call), three_products(call)
    return [
        f"{call.tokens:,} x {call.hidden:,} x {call.vocab:,}", call.path, str(call.symbols["c"]), str(found.launches),
        f"{found.bytes / 1e9:.2f}", f"{found.flop / 1e12:.2f}", f"{found.hidden_seconds * 1e3:.2f}",
        f"{found.full_seconds * 1e3:.2f}", f"{found.hidden_seconds / floor:.3f}", f"{found.full_seconds / floor:.3f}",
    ]  # fmt: skip


def verdict() -> str:
    """The bars, and which of the two figures meets each."""
    lines = ["Bars for the loss with all its gradients, as ratios:", ""]
    for shape, bar in BARS.items():
        for path in ("from targets", "on-policy"):
            found, floor = totals(Call(path, *shape)), three_products(Call(path, *shape))
            hidden, full = (round(seconds / floor, 2) for seconds in (found.hidden_seconds, found.full_seconds))
            said = "met" if full <= bar else "met if the sums are hidden, missed in full" if hidden <= bar else "missed"
            lines.append(f"- {' x '.join(f'{size:,}' for size in shape)}, {path}: {bar:.2f}, {said}.")
    return "\n".join(lines)


def evidence() -> str:
    """What the GPU on record says of the fp32 sums: a call in many small chunks, and product 3 in few large ones."""
    parts = json.loads(RECORD.read_text())["parts"]
    shape = next(iter(BARS))
    taken = {v["call"]: v["ms"] for v in parts["variants"]["variants"] if tuple(v["sizes"]) == shape}
    whole, cut = Call("from targets", *shape), Call("from targets", *shape, workspace_bytes=2**28)
    hidden, full = ((getattr(totals(cut), f) - getattr(totals(whole), f)) * 1e3 for f in Totals._fields[-2:])
    said = (
        f"On the GPU on record {shape[0]:,} x {shape[1]:,} x {shape[2]:,} took "
        f"{taken['workspace of 256 MiB'] - taken['from targets']:.1f} ms longer in {cut.symbols['c']} chunks of "
        f"256 MiB than in one; *hidden* predicts {hidden:.1f} ms and *in full* {full:.1f} ms. Fewer, larger chunks "
        "hide more: "
    )
    third = {v["call"]: 0.0 for v in parts["profile"]["profile"]}
    chunks = dict.fromkeys(third, 0)
    for v in parts["profile"]["profile"]:
        if tuple(v["sizes"]) == shape and v["kernel"].endswith(PRODUCT_3):
            third[v["call"]] += v["ms"]
            chunks[v["call"]] += v["launches"]
    cases = []
    for name in ("fp32 master weight", "fp32 logits"):
        moved = (2 * chunks[name] - 1) * 4 * shape[1] * shape[2] / BYTES_PER_SECOND * 1e3
        cases.append(
            f"in {chunks[name]} chunks ({name}) its third product took {third[name] - third['from targets']:.1f} ms "
            f"longer than in one, of {moved:.1f} ms *in full*"
        )
    return textwrap.fill(said + ", ".join(cases) + " (measurements, bench/results/gpu_suite.json).", 120)


def page() -> str:
    table = [row(Call(path, *shape)) for shape in BARS for path in PATHS]
    variants = []
    for shape in BARS:
        for mark, change in VARIANTS.items():
            size, path, *rest = row(Call("from targets", *shape, **change))
            variants += [[size, f"{path}, {mark}", *rest]] if mark else []
    return HEAD.format(
        group=GROUP,
        tile=SCAN.sizes["TILE"],
        steps=markdown_table(("step", "launched", "launches", "bytes", "FLOP", "paths"), step_rows()).replace(
            "---:", "---"
        ),
        scans=markdown_table(
            ("function", "launches of the scan", "small launches", "bytes"),
            [[f"`{name}`", *(f"`{formula}`" for formula in formulas)] for name, formulas in SCANS.items()],
        ).replace("---:", "---"),
        flops=FLOP_PER_SECOND / 1e12,
        bandwidth=BYTES_PER_SECOND / 1e12,
        evidence=evidence(),
        figures=markdown_table(COLUMNS, table),
        verdict=verdict(),
        variants=markdown_table(COLUMNS, variants),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/gpu-model.md")
    if parser.parse_args().write:
        PAGE.write_text(page())
    print(page())


if __name__ == "__main__":
    main()
