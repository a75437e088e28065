"""Everything worth measuring on a GPU, in one command of at most eight minutes: ``python -m bench.gpu_suite``.

Runs from the source tree, with no network and no compiled extension. It needs torch and triton, and its tests pytest
and hypothesis; with pytest-xdist they run four at a time. Each part is a process of its own with a share of the time,
so that whatever breaks, crashes or hangs leaves the rest alone. Writes bench/results/gpu_suite.json (device, driver,
versions, commit, all results) and a summary in Markdown beside it.

``--dry-run`` does the same on a CPU with tiny sizes, the kernels in Triton's interpreter, so that it cannot rot.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import report
from .environment import ROOT, describe

BUDGET_SECONDS = 480
# Shares of the time, in the order of importance; what a part leaves over goes to those after it.
SECONDS = {"tests": 140, "loss": 160, "caps": 50, "scans": 40, "targets": 35, "logprobs": 30, "planner": 25}
COMPILED = ("torch.compile", "doubling, compiled")
MOST_STEPS = 10_000  # of a Python loop over time, each of them several launches
# The files with tests for a GPU, named so that what the others import need not be there. What only a GPU can show comes
# first, then the kernels one by one, then the library.
TEST_FILES = (
    "kernels/test_gpu.py", "kernels/test_kernels.py", "core/test_returns.py", "core/test_logprobs.py",
    "core/test_loss.py", "core/test_compile.py", "core/test_bad_input.py", "core/test_complaints.py",
    "core/test_planner.py", "core/test_silent_input.py",
)  # fmt: skip
Outcome = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Context:
    """Where a part runs, and whether it is a rehearsal."""

    def __init__(self, dry_run: bool, seconds: float, answer: Path) -> None:
        self.dry_run = dry_run
        self.seconds = seconds
        self.answer = answer
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.deadline = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self, outcome: Outcome) -> Outcome:
        """Keeps what there is so far, in case the part does not live to its end."""
        self.answer.write_text(json.dumps(outcome))
        return outcome


def part_tests(context: Context) -> Outcome:
    """The GPU correctness tests; in a rehearsal they are only collected (without a GPU they would all be skipped)."""
    files = [f"tests/{name}" for name in TEST_FILES]
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", *(["--collect-only", "-q"] if context.dry_run else ["-v"])]
    command += ["-n", "4"] if find_spec("xdist") else []
    with tempfile.TemporaryFile("w+") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ended = "ok" if run.wait(context.left) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # its workers too: the next part wants the GPU for itself
            ended = "out of time"
        log.seek(0)
        output = log.read()
    lines = output.strip().splitlines() or ["no output"]
    return {"status": ended, "summary": lines[-1], "failures": failures(lines)}


def failures(lines: list[str]) -> list[str]:
    """What failed, by the closing summary; where pytest did not live to write it, by its lines of progress."""
    closing = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return closing or [line for line in lines if " FAILED" in line or " ERROR" in line]


def left_out(shape: Any, *, compilers: bool) -> dict[str, str]:
    """The contenders that there is no time for, and why."""
    out = {} if compilers else dict.fromkeys(COMPILED, "compiled for the first shape only")
    steps = getattr(shape, "length", 0)
    return out | ({"naive": f"a Python loop of {steps} steps"} if steps > MOST_STEPS else {})


def _measure(context: Context, task_name: str, presets: list[str], outcome: Outcome) -> Outcome:
    """Adds the records of a task, shape by shape while time is left. Compilers run on the first shape only."""
    from .session import run_task
    from .tasks import TASKS

    task = TASKS[task_name]
    shapes = [s for preset in (["tiny"] if context.dry_run else presets) for s in task.presets[preset]]
    for i, shape in enumerate(shapes):
        if i and context.left < 0.2 * context.seconds:
            say(f"{task_name}: no time left for {shape.name}")
            break
        records = run_task(
            task, [shape], context.device, rounds=1 if context.dry_run else 10, seconds=context.left / 8,
            with_memory=not context.dry_run, limit=None, say=say, deadline=context.deadline,
            left_out=left_out(shape, compilers=i == 0 and not context.dry_run),
        )  # fmt: skip
        outcome.setdefault("results", []).extend(r.to_json() for r in records)
        context.save(outcome)
    return outcome


def part_loss(context: Context) -> Outcome:
    """The shapes of published records: peers that are installed, naive, and the three bare products in one run."""
    return _measure(context, "loss", ["trl-7244", "llama3-8b", "trl-6858", "gemma2-2b", "pythia-1b"], {})


def part_logprobs(context: Context) -> Outcome:
    """Scoring a rollout."""
    return _measure(context, "logprobs", ["qwen3-8b", "pythia-1b"], {})


def part_scans(context: Context) -> Outcome:
    """Every number of warps first, right and how fast; then the scan shapes against peers and a copy."""
    return _measure(context, "scan", ["full"], context.save({"warps": sweep_warps(context)}))


def part_targets(context: Context) -> Outcome:
    """The same shapes, from log-probabilities to lambda-errors."""
    return _measure(context, "targets", ["full"], {})


def sweep_warps(context: Context) -> list[dict[str, Any]]:
    """The reverse scan's error against float64 and its time for each number of warps."""
    from . import oracle
    from .contenders import ours
    from .harness import relative_error, take_turns, typical
    from .inputs import scan_inputs
    from .shapes import Scan

    kernels: Any = import_module("klq_kernels.backends.triton.scans")
    shape = Scan("warps", 4, 48, ragged=True) if context.dry_run else Scan("warps", 64, 32_768, ragged=True)
    inputs = scan_inputs(shape, context.device)
    right = oracle.advantages(inputs, log_ratios=False)["advantages"]
    shipped = kernels.SCAN
    out = []
    for warps in (shipped.num_warps,) if context.dry_run else (1, 2, 4, 8, 16):
        kernels.SCAN = shipped._replace(num_warps=warps)
        try:
            call = ours.advantages(inputs)
            error = relative_error("advantages", call()["advantages"], right)
            taken = take_turns({"scan": call}, context.device, 10, 5.0)["scan"]
            out.append({"num_warps": warps, "error": error, "ms": typical(taken), "right": error < 1e-5})
        finally:
            kernels.SCAN = shipped
    return out


def part_caps(context: Context) -> Outcome:
    """With the allocator capped at 24 GiB, the most tokens that naive and fused train on."""
    from . import caps
    from .shapes import RECORDS, Shape

    cap, heads = caps.CAP, [RECORDS["llama3-8b"], RECORDS["qwen3-8b"]]
    if context.dry_run:  # there is no allocator to cap: what the planner says stands in for it
        cap, heads = 2**17, [Shape("tiny", 1, 16, 128, torch.float32)]
    else:
        total = torch.cuda.get_device_properties(context.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0))
    outcome: Outcome = {"caps": []}
    for head in heads:
        for kind in ("naive", "fused"):
            allowed = caps.predicted_most(head, context.device, kind, cap) if context.dry_run else None
            outcome["caps"].append(caps.largest(head, context.device, kind, cap, say, allowed, context.deadline))
            context.save(outcome)
    return outcome


def part_planner(context: Context) -> Outcome:
    """Predicted against measured peak memory of the loss."""
    from .planner_accuracy import accuracy
    from .shapes import RECORDS, Shape

    shapes = [Shape("tiny", 32, 16, 256, torch.float32)]
    if not context.dry_run:
        shapes = [RECORDS["trl-7244"], RECORDS["pythia-1b"], RECORDS["pythia-1b"]._replace(dtype=torch.float32)]
    return {"planner": accuracy(shapes, context.device)}


PARTS: dict[str, Callable[[Context], Outcome]] = {
    "tests": part_tests,
    "loss": part_loss,
    "caps": part_caps,
    "scans": part_scans,
    "targets": part_targets,
    "logprobs": part_logprobs,
    "planner": part_planner,
}


def run_part(name: str, dry_run: bool, seconds: float) -> Outcome:
    """A part in its own process: its outcome, or why there is none."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if dry_run:
        environment.update(KLQ_BACKEND="triton", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "bench.gpu_suite", "--part", name, "--answer", str(answer)]
        command += ["--seconds", str(seconds), *(["--dry-run"] if dry_run else [])]
        began = time.monotonic()
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds + 20)
            outcome = json.loads(answer.read_text()) if answer.exists() else {}
            status = "ok" if done.returncode == 0 else f"ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = json.loads(answer.read_text()) if answer.exists() else {}
            status = "out of time"
    return {"status": outcome.pop("status", status), "seconds": round(time.monotonic() - began, 1), **outcome}


def answer_part(name: str, dry_run: bool, seconds: float, answer: Path) -> None:
    """What the part's own process does."""
    try:
        outcome = PARTS[name](Context(dry_run, seconds, answer))
    except Exception as error:
        so_far = json.loads(answer.read_text()) if answer.exists() else {}
        status = (
            f"out of time: {error}" if isinstance(error, TimeoutError) else f"failed: {type(error).__name__}: {error}"
        )
        outcome = {**so_far, "status": status[:500]}
    answer.write_text(json.dumps(outcome))


def run(dry_run: bool, parts: list[str]) -> dict[str, Any]:
    """All parts, one after the other, within the budget (of which a rehearsal, on whatever CPU, gets twice as much)."""
    began = time.monotonic()
    budget = BUDGET_SECONDS * (2 if dry_run else 1)
    outcomes: dict[str, Outcome] = {}
    for i, name in enumerate(parts):
        left = budget - (time.monotonic() - began)
        share = SECONDS[name] / sum(SECONDS[p] for p in parts[i:])
        seconds = max(left * share - 20, 10)
        say(f"[{i + 1}/{len(parts)}] {name}: up to {seconds:.0f} s, {left:.0f} s left in all")
        outcomes[name] = run_part(name, dry_run, seconds)
        say(f"{name}: {outcomes[name]['status']}, {outcomes[name]['seconds']} s")
    rows = [row for outcome in outcomes.values() for row in outcome.pop("results", [])]
    device = torch.device("cpu" if dry_run else "cuda")
    command = "python -m bench.gpu_suite" + (" --dry-run" if dry_run else "")
    return {
        "schema": report.SCHEMA,
        "preset": "gpu_suite",
        "environment": describe(device, command),
        "parts": outcomes,
        "results": rows,
    }


def summary(content: dict[str, Any]) -> str:
    """The run in Markdown."""
    environment, parts = content["environment"], content["parts"]
    lines = [
        f"{environment['device']}, driver {environment['driver']}, torch {environment['torch']}, triton "
        f"{environment['triton']}, commit {environment['commit']}: `{environment['command']}`",
        "",
        "| part | outcome | seconds |",
        "|---|---|---:|",
        *(f"| {name} | {_outcome(part)} | {part['seconds']} |" for name, part in parts.items()),
        "",
    ]
    for title, rows in report.groups(content["results"]).items():
        lines += [f"#### {title}", "", *report.markdown_table(rows), ""]
    lines += _caps(parts.get("caps", {}).get("caps", []))
    lines += _planner(parts.get("planner", {}).get("planner", []))
    lines += _warps(parts.get("scans", {}).get("warps", []))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, kernels in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu_suite.json")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of " + ", ".join(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        answer_part(given.part, given.dry_run, given.seconds, given.answer)
        return
    if not given.dry_run and not torch.cuda.is_available():
        sys.exit("no GPU here; --dry-run rehearses on a CPU")
    content = run(given.dry_run, given.parts.split(","))
    report.save_json(given.out, content)
    given.out.with_suffix(".md").write_text(summary(content))
    print(f"wrote {given.out} and {given.out.with_suffix('.md').name}", file=sys.stderr)


if __name__ == "__main__":
    main()
