"""The model of the GPU path against the launches that the code makes, and the tensors that these are passed.

Two ways to see launches without a GPU: a fake one, on which calls of any size run without memory; and the PTX machine,
through which Triton's own launcher compiles and launches the kernels of small calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fake_gpu import FakeCalls, Launch, fake_gpu, size_of

from bench import gpu_model
from bench.gpu_model import BARS, LOSSES, PATHS, Call
from klq_kernels import KLQTargets, fused_klq_loss, gae, klq_targets, linear_logprobs, reverse_scan
from klq_kernels.commands import loss_memory

TESTS = Path(__file__).parents[1]


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def made(call: Call) -> list[Launch]:
    """What the code launches for a call."""
    with fake_gpu() as calls:
        hidden = on_gpu(call.tokens, call.hidden, dtype=torch.bfloat16)
        weight = on_gpu(call.vocab, call.hidden, dtype=torch.float32 if call.fp32_weight else torch.bfloat16)
        actions, ends = on_gpu(call.tokens, dtype=torch.int64), on_gpu(9, dtype=torch.int32)
        head: dict[str, Any] = {"cu_seqlens": ends, "workspace_bytes": call.workspace_bytes}
        head |= {"logits_dtype": torch.float32 if call.fp32_logits else None, "return_entropy": call.entropy}
        if call.bias:
            head["bias"] = on_gpu(call.vocab, dtype=torch.bfloat16)
        by = on_gpu(call.tokens) if call.path.startswith("log-probs") else on_gpu()
        per_token = [on_gpu(call.tokens) for _ in range(5)]
        scores = on_gpu(8)
        calls.launches.clear()
        if call.path in LOSSES:
            run_loss(call, calls, hidden, weight, actions, per_token, scores, by, head)
        else:
            linear_logprobs(hidden, weight, actions, **head)
            if call.path == "log-probs, backward":
                calls.launches.clear()
                calls.backward(by)
    return calls.launches


def run_loss(
    call: Call,
    calls: FakeCalls,
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    per_token: list[Tensor],
    scores: Tensor,
    by: Tensor,
    head: dict[str, Any],
) -> None:
    values, ref, *targets = per_token
    given: dict[str, Any] = {"targets": KLQTargets(*targets)}
    if call.path == "on-policy":
        given = {"ref_logprobs": ref, "rewards": scores}
    head_shapes = [weight.shape, weight.shape[:1]]  # and of a bias
    frozen = {"head frozen": head_shapes, "no gradient": [hidden.shape, values.shape, *head_shapes]}
    calls.learns = lambda tensor: tensor.shape not in frozen.get(call.path, [])
    fused_klq_loss(hidden, weight, actions, values, **given, **head)
    if call.path != "no gradient":
        calls.backward(by)


KERNELS = {
    "row_update",
    "row_stats",
    "row_grad",
    "row_grad_sums",
    "lambda_errors",
    "klq_residual",
    "klq_metrics",
    "scale",
    "reverse_scan",
}
KNOWN = {step.launch for step in gpu_model.STEPS}


def kind(launch: Launch) -> str:
    """The name that the model has for a launch."""
    name = launch.name.removesuffix("_kernel")
    if launch.name.endswith("_kernel"):
        return name
    return name if name in KNOWN and launch.bytes else "small"


def bytes_of(launch: Launch) -> int:
    """Those that it moves: a row is updated in place, read and written; a gradient is left in place by 1."""
    name = kind(launch)
    if name == "scale":
        source, _, out = launch.tensors
        return 0 if source is out else launch.bytes
    return 2 * launch.bytes if name == "row_update" else launch.bytes


CALLS = [
    *(Call(path, *shape) for path in PATHS for shape in BARS),
    *(Call(path, 8192, 4096, 128_256, **{change: True}) for path in PATHS for change in ("fp32_logits", "fp32_weight")),
    *(Call(path, 16_384, 2048, 248_320, fp32_weight=True) for path in ("from targets", "log-probs, backward")),
    *(Call(path, 8192, 4096, 50_257, workspace_bytes=2**28) for path in PATHS),
    *(Call(path, 8192, 4096, 128_256, entropy=True) for path in LOSSES),
    *(Call(path, 8192, 4096, vocab, bias=True) for path in PATHS for vocab in (128_256, 50_257)),
    *(Call(path, 8192, 4096, 128_256, bias=True, fp32_logits=True) for path in PATHS),
    *(Call(path, 777, 64, 1000, workspace_bytes=200_000) for path in PATHS),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: " ".join(map(str, call)))
def test_launches_and_bytes_are_those_of_the_code(call: Call) -> None:
    launched: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    found = made(call)
    for launch in found:
        launched[kind(launch)] += 1
        moved[kind(launch)] += bytes_of(launch)
    wanted_launches: Counter[str] = Counter()
    wanted_bytes: Counter[str] = Counter()
    for step in gpu_model.steps(call):
        wanted_launches[step.launch] += gpu_model.value(step.launches, call)
        wanted_bytes[step.launch] += gpu_model.value(step.bytes, call) + gpu_model.value(step.sums, call)
    flop = sum(launch.flop for launch in found)
    assert flop == gpu_model.totals(call).flop
    assert launched == wanted_launches
    assert +moved == +wanted_bytes


@pytest.mark.parametrize("tokens", [1000, 100_000])
@pytest.mark.parametrize("name", gpu_model.SCANS)
def test_scans_of_the_code(name: str, tokens: int) -> None:
    with fake_gpu() as calls:
        per_token = [on_gpu(tokens) for _ in range(3)]
        layout: dict[str, Any] = {"cu_seqlens": on_gpu(9, dtype=torch.int32)}
        scores = on_gpu(8)
        calls.launches.clear()
        if name == "reverse_scan":
            reverse_scan(per_token[0], 0.9, **layout)
        elif name == "klq_targets":
            klq_targets(*per_token, scores, **layout)
        else:
            gae(*per_token[:2], **layout)
    scans = [launch for launch in calls.launches if launch.name.endswith("_kernel")]
    symbols = {"n": tokens, "t": gpu_model.scan_launches(tokens)}
    moved = 0
    for last, launch in enumerate(scans, 1 - len(scans)):
        long = [tensor for tensor in launch.tensors if tensor.numel() == tokens]
        moved += sum(map(size_of, long)) if last == 0 else sum(map(size_of, long[:-1]))  # the last tensor is the output
    others = [launch for launch in calls.launches if launch not in scans]
    moved += sum(2 * size_of(launch.tensors[0]) for launch in others if launch.name == "copy_")
    wanted = [gpu_model.evaluated(formula, symbols) for formula in gpu_model.SCANS[name]]
    assert [len(scans), len(others), moved] == wanted


MACHINE = [
    ("from targets", 40, None),
    ("from targets", 40, 10_240),
    ("on-policy", 40, None),
    ("on-policy", 40, 10_240),
    ("head frozen", 40, 10_240),
    ("no gradient", 40, 10_240),
    ("log-probs", 40, 10_240),
    ("log-probs, backward", 40, 10_240),
    ("reverse_scan", 900, None),
    ("reverse_scan", 2100, None),
]


@pytest.mark.lengthy
def test_launches_are_those_of_tritons_launcher() -> None:
    """Real calls, on the machine that runs what Triton compiles."""
    calls = [(path, tokens, 16, 300, workspace) for path, tokens, workspace in MACHINE]
    paths = [str(TESTS / "ptx"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "KLQ_PTX": "90"}
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "KLQ_BACKEND"):
        environment.pop(name, None)
    command = [sys.executable, str(TESTS / "ptx" / "count_launches.py"), json.dumps(calls)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for (path, tokens, width, vocab, workspace), counted in zip(calls, json.loads(done.stdout), strict=True):
        wanted: Counter[str] = Counter()
        if path == "reverse_scan":
            wanted[path] = gpu_model.scan_launches(tokens)
        else:
            call = Call(path, tokens, width, vocab, workspace_bytes=workspace)
            assert call.symbols["c"] == (1 if workspace is None else 3)
            for step in gpu_model.steps(call):
                wanted[step.launch] += gpu_model.value(step.launches, call)
        kernels = {name.removesuffix("_kernel"): count for name, count in counted.items()}
        assert kernels == {name: count for name, count in wanted.items() if name in KERNELS}


def test_the_page_is_as_the_model_writes_it() -> None:
    assert gpu_model.PAGE.read_text() == gpu_model.page(), "run python -m bench.gpu_model --write"
    assert "Predictions of a model, not measurements" in gpu_model.page()[:200]


@pytest.mark.parametrize(("shape", "bar"), BARS.items())
@pytest.mark.parametrize("path", ["from targets", "on-policy"])
def test_bars(shape: tuple[int, int, int], bar: float, path: str) -> None:
    """The largest shape, whose gradient is summed in fp32 over four chunks, meets its bar only if that is hidden."""
    call = Call(path, *shape)
    found, floor = gpu_model.totals(call), gpu_model.three_products(call)
    assert 1 < found.hidden_seconds / floor <= bar
    assert found.full_seconds / floor < (bar if call.symbols["c"] == 1 else 1.2)


@pytest.mark.parametrize("tokens", [512, 8192, 16_384, 31_782])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_planner_knows_the_peak_of_the_code(tokens: int, weight_dtype: torch.dtype) -> None:
    """Forward and backward, over the inputs: what the planner says of a GPU, without one."""
    with fake_gpu() as calls:
        calls.keeps_launches = False
        hidden, weight = on_gpu(tokens, 4096, dtype=torch.bfloat16), on_gpu(128_256, 4096, dtype=weight_dtype)
        actions, ends = on_gpu(tokens, dtype=torch.int64), on_gpu(9, dtype=torch.int32)
        values, *targets = (on_gpu(tokens) for _ in range(4))
        by = on_gpu()
        before = calls.allocated([])
        fused_klq_loss(hidden, weight, actions, values, targets=KLQTargets(*targets), cu_seqlens=ends)
        calls.backward(by)
    problem = loss_memory.Problem(tokens, 4096, 128_256, torch.bfloat16, gpu_model.GPU, weight_dtype=weight_dtype)
    assert calls.peak - before == pytest.approx(loss_memory.fused_memory(problem).peak, rel=1e-3)
