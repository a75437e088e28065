"""The parts of ``bench.gpu_suite``: each takes a ``Context`` and returns what it found, as plain JSON values.

A part saves what it has as it goes, in case it is stopped before its end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from klq_kernels import fused_klq_loss, klq_loss, klq_targets, linear_logprobs, reverse_scan

from .environment import ROOT

# Shares of the time, in the order of importance; what a part leaves over goes to those after it.
SECONDS = {
    "contact": 40, "loss": 110, "tests": 120, "variants": 45, "profile": 20, "logprobs": 25, "scans": 30, "targets": 25,
    "caps": 30, "planner": 20, "sweep": 30, "compilers": 40,
}  # fmt: skip
COMPILED = ("torch.compile", "doubling, compiled", "Liger GRPO")
MOST_STEPS = 10_000  # of a Python loop over time, each of them several launches
# The files with tests for a GPU, named so that what the others import need not be there. What only a GPU can show comes
# first, then the kernels one by one, then the library.
TEST_FILES = (
    "kernels/test_gpu.py", "kernels/test_kernels.py", "core/test_returns.py", "core/test_logprobs.py",
    "core/test_loss.py", "core/test_compile.py", "core/test_bad_input.py", "core/test_complaints.py",
    "core/test_sampled.py", "core/test_logits_dtype.py", "core/test_planner.py", "core/test_silent_input.py",
    "core/test_divergence.py", "core/test_selected.py",
)  # fmt: skip
Outcome = dict[str, Any]
LARGE, SMALL = (8192, 4096, 128_256), (512, 4096, 128_256)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Context:
    """Where a part runs, where its files go, and whether it is a rehearsal."""

    def __init__(self, dry_run: bool, seconds: float, answer: Path) -> None:
        self.dry_run = dry_run
        self.seconds = seconds
        self.answer = answer
        self.folder = answer.parent
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.deadline = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self, outcome: Outcome) -> Outcome:
        """Keeps what there is so far, in case the part is stopped before its end."""
        self.answer.write_text(json.dumps(outcome))
        return outcome


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Makes the library use one backend."""
    before = os.environ.get("KLQ_BACKEND")
    os.environ["KLQ_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("KLQ_BACKEND") if before is None else os.environ.update(KLQ_BACKEND=before)


def part_contact(context: Context) -> Outcome:
    """Every public function in each dtype, one sequence and eight: the kernels against plain PyTorch on one device."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    rows: list[dict[str, Any]] = []
    for batch in (1, 8):
        for name, dtype in dtypes.items():
            calls = _contact_calls(_problem(context, dtype, batch))
            for function, call in calls.items():
                if context.left < 0:
                    return context.save({"contact": rows, "status": "out of time"})
                rows.append({"function": function, "dtype": name, "sequences": batch, **_compared(call, dtype)})
                context.save({"contact": rows})
    wrong = sum(not row["right"] for row in rows)
    return {"contact": rows, "status": f"failed: {wrong} of {len(rows)} differ" if wrong else "ok"}


def _problem(context: Context, dtype: torch.dtype, batch: int) -> SimpleNamespace:
    width, vocab, tokens = (16, 300, 24) if context.dry_run else (256, 50_257, 1024)
    generator = torch.Generator().manual_seed(batch)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(context.device)

    return SimpleNamespace(
        hidden=normal(tokens, width).to(dtype).requires_grad_(),
        weight=(3 * normal(vocab, width) / width**0.5).to(dtype).requires_grad_(),
        values=normal(tokens).requires_grad_(),
        actions=torch.randint(vocab, (tokens,), generator=generator).to(context.device),
        ref=-normal(tokens).abs(),
        rewards=normal(tokens),
        cu_seqlens=torch.linspace(0, tokens, batch + 1).int().to(context.device),
    )


def _contact_calls(x: SimpleNamespace) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """The calls that are compared: results and gradients of each public function."""
    layout = {"cu_seqlens": x.cu_seqlens}
    leaves = [x.hidden, x.weight, x.values]

    def loss(**options: Any) -> list[torch.Tensor]:
        found = fused_klq_loss(x.hidden, x.weight, x.actions, x.values, **layout, **options)
        return [found.loss, *found.metrics.values(), *torch.autograd.grad(found.loss, leaves)]

    def targets() -> Any:
        return klq_targets(x.ref, x.ref - 0.1, x.values.detach(), x.rewards, **layout)

    def scored() -> list[torch.Tensor]:
        found = linear_logprobs(x.hidden, x.weight, x.actions, return_entropy=True, **layout)
        assert found.entropy is not None
        gradients = torch.autograd.grad((found.logprobs + found.entropy).sum(), leaves[:2])
        return [found.logprobs, found.logsumexp, found.entropy, *gradients]

    on_policy = {"ref_logprobs": x.ref, "rewards": x.rewards}
    return {
        "reverse_scan": lambda: [reverse_scan(x.rewards, 0.9, **layout)],
        "klq_targets": lambda: list(targets()),
        "klq_loss": lambda: [klq_loss(x.ref, x.values, targets(), loss_type="double_clipped", **layout).loss],
        "linear_logprobs": scored,
        "fused_klq_loss": lambda: loss(targets=targets(), return_entropy=True),
        "fused_klq_loss, on-policy": lambda: loss(**on_policy),
        "fused_klq_loss, in chunks": lambda: loss(**on_policy, workspace_bytes=2**24),
        "fused_klq_loss, soft cap": lambda: loss(**on_policy, softcap=20.0),
        "fused_klq_loss, sampled": lambda: loss(**on_policy, gradient="sampled", samples=16, seed=3),
        "fused_klq_loss, fp32 logits": lambda: loss(**on_policy, logits_dtype=torch.float32),
    }


def _compared(call: Callable[[], list[torch.Tensor]], dtype: torch.dtype) -> dict[str, Any]:
    """The largest relative difference between the kernels and plain PyTorch, and whether rounding explains it."""
    with backend("triton"):
        found = call()
    with backend("torch"):
        wanted = call()
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True)]
    error = max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)) for a, b in pairs)
    return {"error": error, "right": error <= (1e-4 if dtype == torch.float32 else 2e-2)}


def part_tests(context: Context) -> Outcome:
    """The GPU correctness tests; in a rehearsal they are only collected (without a GPU they would all be skipped).

    The whole log goes to a file as it comes, each failure with its traceback as soon as it is known.
    """
    files = [f"tests/{name}" for name in TEST_FILES]
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", "-p", "bench.instant_failures", "--durations=25"]
    command += ["--collect-only", "-q"] if context.dry_run else ["-v"]
    processes = max(min(12, (os.cpu_count() or 1) - 2), 1)
    command += ["-n", str(processes)] if find_spec("xdist") else []
    log = context.folder / "tests.log"
    # a worker's own threads would compete with the other workers
    environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with log.open("w") as file:
        run = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            ended = "ok" if run.wait(context.left) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # its workers too: the next part needs the GPU alone
            ended = "out of time"
    lines = log.read_text().strip().splitlines() or ["no output"]
    return {"status": ended, "summary": lines[-1], "failures": failures(lines)}


def failures(lines: list[str]) -> list[str]:
    """The tests that failed, by the closing summary, or, where pytest was stopped before it, by its progress."""
    closing = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return closing or [line for line in lines if " FAILED" in line or " ERROR" in line]


def left_out(shape: Any, *, compilers: bool) -> dict[str, str]:
    """The contenders that there is no time for, and why."""
    out = {} if compilers else dict.fromkeys(COMPILED, "compiled last, for one shape")
    steps = getattr(shape, "length", 0)
    return out | ({"naive": f"a Python loop of {steps} steps"} if steps > MOST_STEPS else {})


def _measure(
    context: Context, task_name: str, presets: list[str], outcome: Outcome, *, compilers: bool = False
) -> Outcome:
    """Adds the records of a task, shape by shape while time is left."""
    from .session import run_task
    from .tasks import TASKS

    task = TASKS[task_name]
    shapes = [s for preset in (["tiny"] if context.dry_run else presets) for s in task.presets[preset]]
    if context.dry_run:
        shapes = shapes[:1]
    for i, shape in enumerate(shapes):
        if i and context.left < 0.2 * context.seconds:
            say(f"{task_name}: no time left for {shape.name}")
            break
        records = run_task(
            task, [shape], context.device, rounds=1 if context.dry_run else 10, seconds=context.left / 8,
            with_memory=not context.dry_run, limit=None, say=say, deadline=context.deadline,
            left_out=left_out(shape, compilers=compilers and not context.dry_run),
        )  # fmt: skip
        outcome.setdefault("results", []).extend(r.to_json() for r in records)
        context.save(outcome)
    return outcome


def part_loss(context: Context) -> Outcome:
    """The shapes of published records: peers that are installed, naive, and the three bare products in one run."""
    return _measure(context, "loss", ["liger-1356", "few-tokens", "trl-7244", "trl-6858", "gemma2-2b", "pythia-1b"], {})


def part_compilers(context: Context) -> Outcome:
    """The same against compiled PyTorch, whose compiling takes long: last."""
    return _measure(context, "loss", ["pythia-1b"], {}, compilers=True)


def _sizes(context: Context) -> tuple[tuple[int, int, int], ...]:
    """Tokens, hidden, vocabulary; a rehearsal shrinks all to the same."""
    return (LARGE,) if context.dry_run else (LARGE, SMALL)


def _calls_of(context: Context, sizes: tuple[int, int, int]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Ours in the forms in which a trainer may call it, on one shape in bf16, and the three bare products."""
    from .contenders import gradients
    from .inputs import head_inputs
    from .shapes import Shape
    from .tasks import three_gemms

    tokens, width, vocab = (32, 16, 256) if context.dry_run else sizes
    inputs = head_inputs(Shape("variant", tokens, width, vocab), context.device)
    master = inputs.weight.detach().float().requires_grad_()
    bias = torch.zeros(vocab, dtype=inputs.hidden.dtype, device=context.device, requires_grad=True)
    ref, rewards = inputs.targets.old_logprobs, inputs.scores
    off: dict[str, Any] = {"targets": inputs.targets, "cu_seqlens": inputs.cu_seqlens}
    on: dict[str, Any] = {"ref_logprobs": ref, "rewards": rewards, "cu_seqlens": inputs.cu_seqlens}

    def in_three_kernels() -> dict[str, Any]:
        kernels: Any = import_module("klq_kernels.backends.triton")
        shipped, kernels.updates = kernels.updates, lambda *_, **__: False
        try:
            return ours(**off)()
        finally:
            kernels.updates = shipped

    def ours(weight: torch.Tensor = inputs.weight, **options: Any) -> Callable[[], dict[str, Any]]:
        def call() -> dict[str, Any]:
            loss = fused_klq_loss(inputs.hidden, weight, inputs.actions, inputs.values, **options).loss
            return gradients(loss, hidden=inputs.hidden, weight=weight, values=inputs.values)

        return call

    return {
        "three GEMMs": three_gemms(inputs),
        "from targets": ours(**off),
        "from targets, rows in three kernels": in_three_kernels,
        "on-policy": ours(**on),
        "sampled gradient": ours(**off, gradient="sampled", seed=1),
        "sampled gradient, on-policy": ours(**on, gradient="sampled", seed=1),
        "sampled gradient, head frozen": ours(inputs.weight.detach(), **off, gradient="sampled", seed=1),
        "with entropy": ours(**off, return_entropy=True),
        "fp32 logits": ours(**off, logits_dtype=torch.float32),
        "fp32 master weight": ours(master, **off),
        "with a bias": ours(**off, bias=bias),
        "workspace of 256 MiB": ours(**off, workspace_bytes=None if context.dry_run else 2**28),
    }


def part_variants(context: Context) -> Outcome:
    """The cost of the forms of a call, over the three bare products of the same run; and the host's share."""
    from .harness import device_times, take_turns, typical

    rows: list[dict[str, Any]] = []
    for sizes in _sizes(context):
        calls = _calls_of(context, sizes)
        samples = take_turns(calls, context.device, 1 if context.dry_run else 9, context.left / 2)
        floor = typical(samples["three GEMMs"])
        for name, taken in samples.items():
            if isinstance(taken[0], Exception):
                rows.append({"sizes": sizes, "call": name, "error": str(taken[0])[:200]})
                continue
            host = None if context.dry_run else _host_ms(calls[name])
            on_device = None if context.dry_run else bool(device_times(taken))
            ms = typical(taken)
            rows.append({
                "sizes": sizes, "call": name, "ms": ms, "ratio": ms / floor, "host_ms": host, "device_time": on_device,
            })  # fmt: skip
        context.save({"variants": rows})
        del calls
    return {"variants": rows}


def _host_ms(call: Callable[[], dict[str, Any]], times: int = 7) -> float:
    """Median ms until a call has queued its work, the device being idle before."""
    taken = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return sorted(taken)[times // 2]


def part_profile(context: Context) -> Outcome:
    """Every kernel of one call by its name: launches and device time."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] if context.dry_run else [ProfilerActivity.CUDA]
    rows: list[dict[str, Any]] = []
    for sizes in _sizes(context):
        calls = _calls_of(context, sizes)
        for name in ("three GEMMs", "from targets", "on-policy", "fp32 logits", "fp32 master weight"):
            call = calls[name]
            for _ in range(2):
                call()
            with profile(activities=activities) as found:
                call()
                if not context.dry_run:
                    torch.cuda.synchronize()
            for event in found.key_averages():
                taken = event.self_cpu_time_total if context.dry_run else event.self_device_time_total
                if taken:
                    row = {"kernel": event.key[:100], "launches": event.count, "ms": taken / 1e3}
                    rows.append({"sizes": sizes, "call": name, **row})
            context.save({"profile": rows})
    return {"profile": rows}


def part_sweep(context: Context) -> Outcome:
    """Block sizes and warps of the kernels that read logits: TB/s beside those of a copy."""
    from .harness import take_turns, typical

    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        logits, calls = _sweep_calls(context, dtype)
        samples = take_turns(calls, context.device, 1 if context.dry_run else 10, context.left / 2)
        for name, taken in samples.items():
            if isinstance(taken[0], Exception):
                rows.append({"call": name, "dtype": str(dtype), "error": str(taken[0])[:200]})
            else:
                rows.append(_bandwidth(name, dtype, logits.numel(), typical(taken)))
        context.save({"sweep": rows})
    return {"sweep": rows}


def _sweep_calls(context: Context, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, Callable[[], dict[str, Any]]]]:
    """(logits, the kernels on them in each configuration, by name)."""
    from klq_kernels.vocabulary.chunking import row_stride
    from klq_kernels.vocabulary.chunks import Pull, Statistics

    launch: Any = import_module("klq_kernels.backends.triton.launch")
    stats: Any = import_module("klq_kernels.backends.triton.row_stats")
    grad: Any = import_module("klq_kernels.backends.triton.row_grad")
    n, vocab = (4, 5000) if context.dry_run else (4096, 128_256)
    head: dict[str, Any] = {"scale": 1.0, "softcap": None}
    logits = torch.randn(n, row_stride(vocab), device=context.device).to(dtype)[:, :vocab]
    narrow = logits.view(torch.bfloat16)[:, :vocab]
    copied = torch.empty_like(logits)
    actions = torch.randint(vocab, (n,), device=context.device)
    columns = [torch.full((n,), x, device=context.device) for x in (5.0, 10.0, 1e-3, -1e-3)]
    top, log_total, logp = (torch.empty(n, device=context.device) for _ in range(3))
    out, pull = Statistics(top, log_total, logp, None), Pull(*columns)

    def with_config(module: Any, name: str, config: Any, call: Callable[[], object]) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            shipped = getattr(module, name)
            setattr(module, name, config)
            try:
                call()
            finally:
                setattr(module, name, shipped)
            return {}

        return run

    calls: dict[str, Callable[[], dict[str, Any]]] = {"copy": lambda: {"copy": copied.copy_(logits)}}
    for groups, lanes, warps in ((8, 1024, 4), (4, 1024, 4), (8, 2048, 8), (4, 2048, 8), (2, 4096, 16)):
        config = {logits.element_size(): launch.Config({"GROUPS": groups, "LANES": lanes}, warps)}
        calls[f"row_stats {groups} x {lanes}, {warps} warps"] = with_config(
            stats, "ROW_STATS", config, lambda: stats.row_stats(logits, actions, out, **head)
        )
    for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8)):
        config = launch.Config({"BLOCK": block}, warps)
        calls[f"row_grad {block}, {warps} warps"] = with_config(
            grad, "ROW_GRAD", config, lambda: grad.row_grad(logits, actions, pull, logits, **head)
        )
        if dtype == torch.float32:
            calls[f"row_grad to bf16 {block}, {warps} warps"] = with_config(
                grad, "ROW_GRAD", config, lambda: grad.row_grad(logits, actions, pull, narrow, **head)
            )
    if dtype == torch.bfloat16:
        calls |= _updates(context, logits, actions, out)
    return logits, calls


def _updates(
    context: Context, logits: torch.Tensor, actions: torch.Tensor, found: Any
) -> dict[str, Callable[[], dict[str, Any]]]:
    """From logits to their gradient: three kernels one after the other, and ``row_update`` as it may be launched."""
    from klq_kernels.vocabulary.chunks import LossShape, Pull, Residuals, Terms

    kernels: Any = import_module("klq_kernels.backends.triton")
    update: Any = import_module("klq_kernels.backends.triton.row_update")
    columns = [torch.full_like(found.logp, x) for x in (1.0, -2.0, 0.5, 0.1)]
    terms = Terms(found.logp, columns[0], columns[1], columns[2], columns[3], None)
    residuals = Residuals(*(torch.empty_like(found.logp) for _ in range(3)))
    shape = LossShape(0.05, 1.0, "l2", 1.0, 0.2, 0.2)
    grad_scale = torch.tensor(1e-3, device=context.device)
    head: dict[str, Any] = {"scale": 1.0, "softcap": None}

    def apart() -> dict[str, Any]:
        kernels.row_stats(logits, actions, found, **head)
        kernels.klq_residual(terms, residuals, grad_scale=grad_scale, shape=shape)
        pull = Pull(found.top, found.log_total, residuals.d_logp, residuals.d_values)
        kernels.row_grad(logits, actions, pull, logits, **head)
        return {}

    def at_once(config: Any) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            shipped, update.ROW_UPDATE = update.ROW_UPDATE, config
            try:
                update.row_update(
                    logits, actions, terms, found, residuals, grad_scale=grad_scale, shape=shape, scale=1.0
                )
            finally:
                update.ROW_UPDATE = shipped
            return {}

        return run

    calls: dict[str, Callable[[], dict[str, Any]]] = {"row_stats, klq_residual, row_grad": apart}
    sizes = (
        (4, 8192, 16384, 32), (2, 8192, 16384, 32), (1, 8192, 8192, 32), (4, 4096, 8192, 16), (2, 8192, 16384, 16),
        (8, 4096, 16384, 16), (8, 2048, 8192, 8), (4, 2048, 8192, 8),
    )  # fmt: skip
    for groups, lanes, block, warps in sizes:
        config = update.ROW_UPDATE._replace(sizes={"GROUPS": groups, "LANES": lanes, "BLOCK": block}, num_warps=warps)
        calls[f"row_update {groups} x {lanes}, {block}, {warps} warps"] = at_once(config)
    return calls


def _bandwidth(name: str, dtype: torch.dtype, logits: int, ms: float) -> dict[str, Any]:
    """Bytes a logit, at the least: statistics read it, the others also write it, in bf16 where it is narrower."""
    written = 0 if name.startswith("row_stats ") else 2 if "to bf16" in name else dtype.itemsize
    size = logits * (dtype.itemsize + written)
    return {"call": name, "dtype": str(dtype), "ms": ms, "terabytes_per_second": size / ms / 1e9}


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
    if context.dry_run:  # there is no allocator to cap: the planner's prediction takes its place
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
    "contact": part_contact,
    "loss": part_loss,
    "tests": part_tests,
    "variants": part_variants,
    "profile": part_profile,
    "logprobs": part_logprobs,
    "scans": part_scans,
    "targets": part_targets,
    "caps": part_caps,
    "planner": part_planner,
    "sweep": part_sweep,
    "compilers": part_compilers,
}
