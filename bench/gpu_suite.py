"""Everything worth measuring on a GPU, in one command of at most eight minutes: ``python -m bench.gpu_suite``.

Runs from the source tree, with no network and no compiled extension. It needs torch and triton, and its tests pytest
and hypothesis; with pytest-xdist they run a dozen at a time. Each part (``bench.gpu_parts``) is a process of its own
with a share of the time, so that whatever breaks, crashes or hangs leaves the rest alone. The first compares every
kernel with plain PyTorch.

Writes bench/results/gpu_suite.json (device, driver, versions, commit, all results) and a summary in Markdown beside it
after every part, so that a run that is cut off loses nothing; in gpu_suite_parts/ beside them lie the parts' own files
and the log of the tests.

``--dry-run`` does the same on a CPU with tiny sizes, the kernels in Triton's interpreter, so that it cannot rot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import report
from .environment import ROOT, describe
from .gpu_parts import PARTS, SECONDS, Context, Outcome, say

BUDGET_SECONDS = 480
RESERVE_SECONDS = 8  # for a part's process to start and end in


def run_part(name: str, dry_run: bool, seconds: float, folder: Path) -> Outcome:
    """Runs a part in its own process. Returns its outcome, or the reason why there is none."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if dry_run:
        environment.update(KLQ_BACKEND="triton", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    answer = folder / f"{name}.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu_suite", "--part", name, "--answer", str(answer)]
    command += ["--until", str(time.time() + seconds), *(["--dry-run"] if dry_run else [])]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds + RESERVE_SECONDS)
        status = "ok" if done.returncode == 0 else f"ended with code {done.returncode}"
    except subprocess.TimeoutExpired:
        status = "out of time"
    outcome = json.loads(answer.read_text()) if answer.exists() else {}
    return {"status": outcome.pop("status", status), "seconds": round(time.monotonic() - began, 1), **outcome}


def answer_part(name: str, dry_run: bool, until: float, answer: Path) -> None:
    """Runs a part in its own process, until the clock shows ``until`` (its imports have taken some of the time)."""
    try:
        outcome = PARTS[name](Context(dry_run, until - time.time(), answer))
    except Exception as error:
        so_far = json.loads(answer.read_text()) if answer.exists() else {}
        status = (
            f"out of time: {error}" if isinstance(error, TimeoutError) else f"failed: {type(error).__name__}: {error}"
        )
        outcome = {**so_far, "status": status[:500]}
    answer.write_text(json.dumps(outcome))


def _kept(out: Path, environment: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    """The results of other parts from an earlier run on the same device and versions."""
    content: dict[str, Any] = {"schema": report.SCHEMA, "preset": "gpu_suite", "parts": {}, "results": []}
    before = report.load_json(out) if out.exists() else content
    same = all(before.get("environment", {}).get(name) == environment[name] for name in ("device", "torch", "triton"))
    if same:
        content["parts"] = {name: part for name, part in before["parts"].items() if name not in parts}
        content["results"] = [row for row in before["results"] if row["part"] not in parts]
    return content | {"environment": environment}


def run(dry_run: bool, parts: list[str], out: Path, *, budget: float, commit: str | None = None) -> dict[str, Any]:
    """All parts, one after the other, within ``budget`` seconds; ``out`` and its summary are written after each."""
    began = time.monotonic()
    folder = out.parent / f"{out.stem}_parts"
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if dry_run else "cuda")
    environment = describe(device, "python -m bench.gpu_suite" + (" --dry-run" if dry_run else ""))
    environment |= {"commit": commit} if commit else {}
    content = _kept(out, environment, parts)
    for i, name in enumerate(parts):
        left = budget - (time.monotonic() - began)
        share = SECONDS[name] / sum(SECONDS[p] for p in parts[i:])
        seconds = max(left * share - RESERVE_SECONDS, 5)
        say(f"[{i + 1}/{len(parts)}] {name}: up to {seconds:.0f} s, {left:.0f} s left in all")
        outcome = run_part(name, dry_run, seconds, folder)
        say(f"{name}: {outcome['status']}, {outcome['seconds']} s")
        content["results"] += [row | {"part": name} for row in outcome.pop("results", [])]
        content["parts"][name] = outcome | {"commit": environment["commit"]}
        report.save_json(out, content)
        out.with_suffix(".md").write_text(summary(content))
    return content


def summary(content: dict[str, Any]) -> str:
    """The run in Markdown."""
    environment, parts = content["environment"], content["parts"]
    lines = [
        f"{environment['device']}, driver {environment['driver']}, torch {environment['torch']}, triton "
        f"{environment['triton']}: `{environment['command']}`",
        "",
        "| part | outcome | seconds | commit |",
        "|---|---|---:|---|",
        *(f"| {name} | {_outcome(part)} | {part['seconds']} | {part['commit']} |" for name, part in parts.items()),
        "",
    ]
    for title, rows in report.groups(content["results"]).items():
        lines += [f"#### {title}", "", *report.markdown_table(rows), ""]
    lines += _caps(parts.get("caps", {}).get("caps", []))
    lines += _planner(parts.get("planner", {}).get("planner", []))
    lines += _warps(parts.get("scans", {}).get("warps", []))
    lines += _contact(parts.get("contact", {}).get("contact", []))
    lines += _variants(parts.get("variants", {}).get("variants", []))
    lines += _profile(parts.get("profile", {}).get("profile", []))
    lines += _sweep(parts.get("sweep", {}).get("sweep", []))
    return "\n".join(lines).strip() + "\n"


def _outcome(part: Outcome) -> str:
    return f"{part['status']}: {part['summary']}" if "summary" in part else str(part["status"])


def _caps(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    gib = rows[0]["cap_bytes"] / 2**30
    return [
        f"#### Most tokens that train with the allocator capped at {gib:.3g} GiB",
        "",
        "| head | loss | tokens | tokens x vocabulary | predicted tokens |",
        "|---|---|---:|---:|---:|",
        *(
            f"| {r['shape']}, H={r['hidden']} V={r['vocab']} {r['dtype']} | {r['kind']} | {r['tokens']:,} | "
            f"{r['tokens'] * r['vocab']:.2e} | {r['predicted_tokens']:,} |"
            for r in rows
        ),
        "",
    ]


def _planner(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "#### Memory, predicted against measured",
        "",
        "| loss | shape | predicted | measured | ratio |",
        "|---|---|---:|---:|---:|",
        *(
            f"| {r['kind']} | {report.problem_text(r['shape'])} | {report.bytes_text(r['predicted_bytes'])} | "
            f"{report.bytes_text(r['measured_bytes'])} | {report.ratio(r['ratio'])} |"
            for r in rows
        ),
        "",
    ]


def _warps(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "#### The reverse scan by number of warps",
        "",
        "| warps | error | ms |",
        "|---:|---:|---:|",
        *(f"| {r['num_warps']} | {r['error']:.0e} | {report.milliseconds(r['ms'])} |" for r in rows),
        "",
    ]


def _contact(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "#### The kernels against plain PyTorch on the same device",
        "",
        "| function | dtype | sequences | largest relative difference | |",
        "|---|---|---:|---:|---|",
        *(
            f"| {r['function']} | {r['dtype']} | {r['sequences']} | {r['error']:.1e} | "
            f"{'right' if r['right'] else '**WRONG**'} |"
            for r in rows
        ),
        "",
    ]


def _variants(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []

    def cells(row: dict[str, Any]) -> str:
        if "error" in row:
            return f"failed: {row['error'].splitlines()[0]} | | |"
        host = "" if row["host_ms"] is None else report.milliseconds(row["host_ms"])
        return f"{report.milliseconds(row['ms'])} | {report.ratio(row['ratio'])} | {host} |"

    return [
        "#### The forms of a call, bf16",
        "",
        "To be compared within this table. What runs before a call changes how fast the card runs it, so the same call "
        "has another ratio to the three GEMMs among the contenders above.",
        "",
        "| tokens, hidden, vocabulary | call | ms | over the three GEMMs | host ms |",
        "|---|---|---:|---:|---:|",
        *(f"| {_sizes(row)} | {row['call']} | {cells(row)}" for row in rows),
        "",
    ]


def _profile(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    shown = [row for row in rows if row["ms"] >= 0.02]
    return [
        "#### Kernels of one call (those of 0.02 ms and more)",
        "",
        "| tokens, hidden, vocabulary | call | kernel | launches | ms |",
        "|---|---|---|---:|---:|",
        *(
            f"| {_sizes(r)} | {r['call']} | `{r['kernel'][:60].replace('|', ' ')}` | {r['launches']} | {r['ms']:.3f} |"
            for r in sorted(shown, key=lambda r: (rows[0]["sizes"] != r["sizes"], r["call"], -r["ms"]))
        ),
        "",
    ]


def _sweep(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "#### Block sizes and warps of the kernels that read logits",
        "",
        "| logits | call | ms | TB/s |",
        "|---|---|---:|---:|",
        *(
            f"| {r['dtype']} | {r['call']} | "
            + (f"failed: {r['error'].splitlines()[0]} | |" if "error" in r else _bandwidth_cells(r))
            for r in rows
        ),
        "",
    ]


def _bandwidth_cells(row: dict[str, Any]) -> str:
    return f"{row['ms']:.3f} | {row['terabytes_per_second']:.2f} |"


def _sizes(row: dict[str, Any]) -> str:
    return " x ".join(f"{size:,}" for size in row["sizes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, kernels in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu_suite.json")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of " + ", ".join(PARTS))
    parser.add_argument(
        "--budget", type=float, help=f"seconds for all parts; {BUDGET_SECONDS}, twice that in a dry run"
    )
    parser.add_argument("--commit", help="to be recorded where the sources lie outside a git checkout")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        answer_part(given.part, given.dry_run, given.until, given.answer)
        return
    if not given.dry_run and not torch.cuda.is_available():
        sys.exit("no GPU here; --dry-run rehearses on a CPU")
    unknown = set(given.parts.split(",")) - PARTS.keys()
    if unknown:
        sys.exit(f"--parts: there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    budget = given.budget or BUDGET_SECONDS * (2 if given.dry_run else 1)
    content = run(given.dry_run, given.parts.split(","), given.out, budget=budget, commit=given.commit)
    print(summary(content))
    print(f"wrote {given.out} and {given.out.with_suffix('.md').name}", file=sys.stderr)


if __name__ == "__main__":
    main()
