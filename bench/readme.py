"""The README's figures, written from committed results: ``python -m bench.readme`` (``--check`` compares the text).

Fills the part between the markers with tables made of gpu_suite.json, cpu_memory.json and cpu_time.json in
bench/results, and draws docs/memory.png. Run it after ``make gpu`` or ``python -m bench.readme_numbers``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import report
from .environment import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
PICTURE = ROOT / "docs" / "memory.png"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def on_gpu(suite: dict[str, Any]) -> list[str]:
    """The loss on a GPU, every contender that computes it or a cross-entropy rightly."""
    machine = suite["environment"]
    rows = [row for row in suite["results"] if row["task"] == "loss" and row["status"] in ("ok", "floor")]
    return [
        f"On a GPU: `make gpu`, {machine['device']}, driver {machine['driver']}, torch {machine['torch']}, triton "
        f"{machine['triton']}. Loss and all gradients, bf16, side by side in one run (ratios below 1 are faster; the "
        "floor is the three bare matrix products; memory is the peak over the inputs, gradients included):",
        "",
        "| loss | tokens, hidden, vocabulary | device ms | x naive | x floor | memory |",
        "|---|---|---:|---:|---:|---:|",
        *(_on_gpu(row) for row in rows),
        "",
    ]


def _on_gpu(row: dict[str, Any]) -> str:
    shape = ", ".join(f"{row['sizes'][name]:,}" for name in ("tokens", "hidden", "vocab"))
    name = row["name"] + (" (cross-entropy)" if row["computes"] == "cross-entropy" else "")
    on_device = row["device_ms"] is not None  # unless the host was late with queueing the work
    ms = report.milliseconds(row["device_ms"]) if on_device else f"{report.milliseconds(row['ms'])} (full call)"
    ratios = (report.ratio(row[name]) for name in ("ratio_to_naive", "ratio_to_floor"))
    memory = "-" if row["peak_bytes"] is None else report.bytes_text(row["peak_bytes"])
    return f"| {name} | {shape} | {ms} | {' | '.join(ratios)} | {memory} |"


def numbers(suite: dict[str, Any], memory: dict[str, Any], timing: dict[str, Any]) -> str:
    """The text between the markers."""
    machine = memory["environment"]
    lines = [
        *on_gpu(suite),
        f"On a CPU: `{machine['command']}` ({machine['device']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, backend {machine['backend']}).",
        "",
        "Loss and all gradients, peak memory over the inputs:",
        "",
        "| loss | shape | peak | of it beyond the gradients |",
        "|---|---|---:|---:|",
    ]
    for row in memory["planner"]:
        peak, beyond = (report.bytes_text(row[name]) for name in ("measured_bytes", "beyond_gradients_bytes"))
        lines.append(f"| {row['kind']} | {report.problem_text(row['shape'])} | {peak} | {beyond} |")
    rows = [row for row in timing["results"] if row["status"] in ("ok", "floor")]
    lines += [
        "",
        "Time, side by side in one run (ratios below 1 are faster; the floor is the three bare matrix products):",
        "",
        "| loss | shape | ms | x naive | x floor |",
        "|---|---|---:|---:|---:|",
        *(f"{_time(row)} |" for row in rows if row["task"] == "loss"),
        "",
        "Scoring, as a rollout is scored, likewise (the floor is one product; the error is the largest of any token, "
        "in nats, against float64):",
        "",
        "| log-probabilities | shape | ms | x naive | x floor | error |",
        "|---|---|---:|---:|---:|---:|",
        *(f"{_time(row)} | {report.error_text(row['error'])} |" for row in rows if row["task"] == "logprobs"),
    ]
    return "\n".join([*lines, "", "[All benchmarks](docs/benchmarks.md)."])


def _time(row: dict[str, Any]) -> str:
    """The cells that every table of times has."""
    shape = ", ".join(f"{name}={size:,}" for name, size in row["sizes"].items())
    ratios = (report.ratio(row[name]) for name in ("ratio_to_naive", "ratio_to_floor"))
    return f"| {row['name']} | {shape}, {row['dtype']} | {row['ms']:,.0f} | {' | '.join(ratios)}"


def filled(readme: str, text: str) -> str:
    from klq_kernels.lab.display import with_text

    return with_text(readme, "numbers", text)


def draw(memory: dict[str, Any], path: Path) -> None:
    """Bars of peak memory: the gradients, which every loss has to hand out, and what each needs beyond them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = memory["planner"]
    figure, axes = plt.subplots(figsize=(7.5, 2.6), layout="constrained")
    labels = [f"{row['kind']}, {row['shape']['dtype']}" for row in rows]
    gradients = [row["gradient_bytes"] / 2**30 for row in rows]
    beyond = [row["beyond_gradients_bytes"] / 2**30 for row in rows]
    axes.barh(labels, gradients, color="0.75", label="gradients of hidden states and weight")
    bars = axes.barh(labels, beyond, left=gradients, color="#0072b2", label="everything else")
    axes.bar_label(bars, [f" {a + b:.2f} GiB" for a, b in zip(gradients, beyond, strict=True)])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    shape = rows[0]["shape"]
    sizes = f"{shape['tokens']:,} tokens, hidden size {shape['hidden']:,}, vocabulary {shape['vocab']:,}"
    axes.set_title(f"KLQ loss and gradients: {sizes}", loc="left", fontsize=10)
    axes.set_xlabel("peak memory over the inputs, GiB")
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where the README's figures are not these")
    given = parser.parse_args()
    memory = load("cpu_memory")
    old = README.read_text()
    new = filled(old, numbers(load("gpu_suite"), memory, load("cpu_time")))
    if given.check:
        sys.exit(0 if new == old else "README.md: run python -m bench.readme")
    README.write_text(new)
    draw(memory, PICTURE)


if __name__ == "__main__":
    main()
