"""The time of the loss with a sampled gradient on a GPU, by a model: the bytes of each step, and the first product.

    python -m bench.sampled_model            print the table
    python -m bench.sampled_model --write    put it, and the bars of the CPU, into docs/sampled-gradient.md

A step takes as long as its bytes at the rate of a copy, or as its instructions at the rate of issue, whichever is more.
Both rates, and that of the products, are those of the GPU run on record (``bench/results/gpu_suite.json``) and its
device; instructions per logit are those of the static gate. Nothing here is a measurement: ``make gpu`` measures it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from klq_kernels.commands.loss_memory import SEGMENT
from klq_kernels.lab.display import markdown_table, with_text

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "sampled-gradient.md"
TOKENS, HIDDEN, VOCAB, SAMPLES, ITEM = 8192, 4096, 131_072, 64, 2
# H100 SXM: multiprocessors x lanes issued per clock x boost clock
LANES_PER_SECOND = 132 * 128 * 1.98e9


class Step(NamedTuple):
    """One step of the pass: bytes read and written, and instructions per thread times threads."""

    name: str
    bytes: float
    instructions: float = 0.0


def rates() -> tuple[float, float]:
    """(FLOP per second of the three products, bytes per second of a copy) on the GPU on record."""
    parts = json.loads((RESULTS / "gpu_suite.json").read_text())["parts"]
    rows = parts["variants"]["variants"]
    [gemms] = [row for row in rows if row["call"] == "three GEMMs" and row["sizes"][0] == TOKENS]
    tokens, hidden, vocab = gemms["sizes"]
    copies = [row["terabytes_per_second"] for row in parts["sweep"]["sweep"] if row["call"] == "copy"]
    return 6 * tokens * hidden * vocab / (gemms["ms"] / 1e3), copies[0] * 1e12


def instructions(kernel: str) -> float:
    """Per logit and thread, on sm_90."""
    gate = json.loads((RESULTS / "static_gate.json").read_text())["targets"]["sm_90"]
    return float(gate[kernel]["issue_slots"])


def steps() -> list[Step]:
    """All steps after the first product, with K + 1 entries for every token, none of them found in a cache."""
    logits, entries = TOKENS * VOCAB, TOKENS * (SAMPLES + 1)
    segments = logits / SEGMENT * 8
    again = min(entries * SEGMENT, logits) * ITEM  # a segment for each entry
    return [
        Step("statistics of the rows", logits * ITEM, logits * instructions("row_stats[bf16]")),
        Step("selection", logits * ITEM + 2 * segments + again, logits * instructions("row_select[bf16]")),
        Step("entries by column", entries * 4 * 2 * 8),  # a radix sort in passes of a byte, keys and places
        Step("gradient of hidden states", entries * HIDDEN * ITEM + TOKENS * HIDDEN * ITEM),
        Step("gradient of the weight", entries * HIDDEN * ITEM + VOCAB * HIDDEN * ITEM),
    ]


def model() -> tuple[list[tuple[str, float, float]], float, float]:
    """(step, bytes, ms) of each, ms of them all, and ms of three products."""
    flop_rate, byte_rate = rates()
    gemm = 2 * TOKENS * HIDDEN * VOCAB / flop_rate * 1e3
    rows = [("first product", float((TOKENS + VOCAB) * HIDDEN + TOKENS * VOCAB) * ITEM, gemm)]
    for step in steps():
        taken = max(step.bytes / byte_rate, step.instructions / LANES_PER_SECOND) * 1e3
        rows.append((step.name, step.bytes, taken))
    return rows, sum(ms for _, _, ms in rows), 3 * gemm


def table() -> str:
    rows, total, three = model()
    body: list[list[Any]] = [[name, f"{size / 1e9:.2f}", f"{ms:.2f}"] for name, size, ms in rows]
    body += [["all", "", f"{total:.1f}"], ["three products", "", f"{three:.1f}"], ["ratio", "", f"{total / three:.2f}"]]
    return markdown_table(("step", "GB", "ms"), body)


def bars() -> str:
    """The sampled gradient's bars of ``bench.native_bars``, and beside them those where glibc keeps freed memory."""
    sections = json.loads((RESULTS / "native_bars.json").read_text())["sections"]
    found = {name: section for name, section in sections.items() if name.startswith("sampled")}
    kept = {name.split()[-1]: section for name, section in sections.items() if name.startswith("GLIBC")}
    rows = []
    for name, section in found.items():
        beside = {bar["name"]: f"{bar['value']:.3f}" for bar in kept.get(name, {"bars": []})["bars"]}
        rows += [[bar["name"], f"{bar['value']:.3f}", beside.get(bar["name"], "")] for bar in section["bars"]]
    environment = next(iter(found.values()))["environment"]
    table = markdown_table(("ratio", "median", "memory kept"), rows)
    return f"{table}\n\nOn {environment['device']}, {environment['isa']}."


def filled(page: str) -> str:
    """The page with both tables as they are now."""
    return with_text(with_text(page, "bars", bars()), "model", table())


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(filled(PAGE.read_text()))
    print(table())
