"""Properties that only a GPU can show: no hidden synchronisation, graph capture, allocator peaks, 64-bit offsets.

The numerics of each kernel are in test_kernels.py, those of the whole pass in the common suite.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import klq_kernels
from bench.contenders import Outputs
from bench.harness import GpuTimer
from klq_kernels import reference
from klq_kernels.vocabulary import chunking

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Makes every implicit wait for the GPU an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def packed_case(
    lengths: list[int], width: int, vocab: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(leaves, other arguments) of an on-policy call in the packed layout."""
    g = torch.Generator("cuda").manual_seed(0)
    n = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    leaves = {
        "hidden": normal(n, width).to(dtype).requires_grad_(),
        "weight": (normal(vocab, width) / width**0.5).to(dtype).requires_grad_(),
        "values": normal(n).requires_grad_(),
    }
    given = {
        "actions": torch.randint(vocab, (n,), generator=g, device="cuda"),
        "ref_logprobs": -normal(n).abs(),
        "rewards": normal(len(lengths)),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda"),
    }
    return leaves, given


def step(leaves: dict[str, Tensor], given: dict[str, Tensor], **settings: object) -> list[Tensor]:
    arguments = given | leaves
    first = [arguments.pop(name) for name in ("hidden", "weight", "actions", "values")]
    loss = klq_kernels.fused_klq_loss(*first, **arguments, **settings).loss
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return [loss.detach(), *gradients]  # a graph that lives on would tie the leaves to the stream it was made on


@pytest.mark.parametrize("loss_type", ["l2", "double_clipped"])
def test_the_packed_layout_never_synchronises(loss_type: str) -> None:
    leaves, given = packed_case([40, 1, 23], 64, 1000, torch.bfloat16)
    values, ref, cu_seqlens = leaves["values"].detach(), given["ref_logprobs"], given["cu_seqlens"]
    count = torch.tensor(values.numel(), device="cuda")

    def everything() -> None:
        step(leaves, given, loss_type=loss_type, workspace_bytes=2 * 1024 * 16)
        step(leaves, given, loss_type=loss_type, gradient="sampled", samples=8)
        step(leaves, given, loss_type=loss_type, gradient="sampled", samples=8, seed=3)
        targets = klq_kernels.klq_targets(ref, ref, values, given["rewards"], cu_seqlens=cu_seqlens)
        klq_kernels.klq_loss(ref, values, targets, cu_seqlens=cu_seqlens, denom=count)
        klq_kernels.klq_loss(ref, values, targets, cu_seqlens=cu_seqlens, denom=torch.tensor(7.0))
        klq_kernels.reverse_scan(values, 0.9, cu_seqlens=cu_seqlens)

    everything()  # compiles
    with no_synchronisation():
        everything()


def test_a_packing_pays_the_synchronisation_once() -> None:
    mask = torch.rand(4, 32, device="cuda") < 0.5
    packing = klq_kernels.pack(mask=mask)
    hidden = torch.randn(4, 32, 64, device="cuda")
    weight = torch.randn(1000, 64, device="cuda")
    actions = torch.randint(1000, (4, 32), device="cuda")
    first = klq_kernels.linear_logprobs(hidden, weight, actions, packing=packing).logprobs
    with no_synchronisation():
        again = klq_kernels.linear_logprobs(hidden, weight, actions, packing=packing).logprobs
    assert torch.equal(first, again)


@pytest.mark.parametrize("gradient", ["dense", "sampled"])
def test_the_packed_step_can_be_captured_in_a_cuda_graph(gradient: str) -> None:
    leaves, given = packed_case([40, 1, 23], 64, 1000, torch.bfloat16)
    how = {"gradient": gradient, "seed": torch.tensor(5, device="cuda")}
    wanted = step(leaves, given, **how)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(leaves, given, **how)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves, given, **how)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(wanted, captured, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_the_workspace(dtype: torch.dtype) -> None:
    """Over inputs and gradients: one chunk of logits, and in 16 bits the fp32 accumulator of the weight gradient."""
    width, vocab, workspace = 1024, 128256, 64 * chunking.MIB
    leaves, given = packed_case([1024, 1024], width, vocab, dtype)
    step(leaves, given, workspace_bytes=workspace)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = step(leaves, given, workspace_bytes=workspace)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    kept = sum(g.numel() * g.element_size() for g in gradients)
    accumulator = 0 if dtype == torch.float32 else 4 * vocab * width
    assert peak <= kept + accumulator + 1.1 * workspace


def test_logits_beyond_two_to_the_31() -> None:
    """A chunk of more than 2^31 logits: offsets are 64 bits wide (CCE #37, fla #1082, Liger #1294)."""
    rows, vocab = 16_640, 131_072
    workspace = 2 * rows * vocab + 2**20
    chunk = chunking.chunk_rows(rows, vocab, torch.bfloat16, torch.device("cuda"), workspace)
    assert chunk * chunking.row_stride(vocab) > 2**31
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    leaves, given = packed_case([rows], 64, vocab, torch.bfloat16)
    at_once = step(leaves, given, workspace_bytes=workspace)
    in_chunks = step(leaves, given, workspace_bytes=2**28)
    for a, b in zip(at_once, in_chunks, strict=True):
        assert (a - b).float().norm() <= 1e-2 * b.float().norm()  # the rows beyond are a tenth of the norm


Scan = Callable[..., Tensor]


def lambda_errors(module: ModuleType) -> Scan:
    def scan(logp: Tensor, ref: Tensor, values: Tensor, rewards: Tensor, trace: Tensor, **layout: Tensor) -> Tensor:
        return module.klq_targets(logp, ref, values, rewards, trace=trace, lam=1.0, **layout).advantages

    return scan


# The function, its reference, and how many columns of tokens it takes.
SCANS: dict[str, tuple[Scan, Scan, int]] = {
    "reverse_scan": (klq_kernels.reverse_scan, reference.reverse_scan, 2),
    "lambda_errors": (lambda_errors(klq_kernels), lambda_errors(reference), 5),
}


@functools.cache
def scan_case(kernel: str, n: int) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """(columns, layout, float64 answer): six sequences, the last one long, with masked tokens.

    The last column is a decay, or a trace, so near to 1 that what happens far away still counts.
    """
    _, right, count = SCANS[kernel]
    g = torch.Generator().manual_seed(n)
    columns = [*torch.randn(count - 1, n, generator=g), 1 - 1e-4 * torch.rand(n, generator=g)]
    cuts = torch.randint(n // 8, (5,), generator=g).sort().values.tolist()
    layout = {"mask": torch.rand(n, generator=g) < 0.8, "cu_seqlens": torch.tensor([0, *cuts, n], dtype=torch.int32)}
    return columns, layout, right(*(column.double() for column in columns), **layout)


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
@pytest.mark.parametrize("tile", [256, 1024, 2048])
@pytest.mark.parametrize("n", [1000, 40_009])  # the longer: more small tiles than a program looks at in one step
@pytest.mark.parametrize("kernel", SCANS)
def test_the_scans_with_every_number_of_warps(
    kernel: str, num_warps: int, tile: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's reverse scan has been reported wrong (triton #4362, #8412): every way to run it, against float64."""
    scans = importlib.import_module("klq_kernels.backends.triton.scans")
    monkeypatch.setattr(scans, "SCAN", scans.SCAN._replace(sizes={"TILE": tile, "SLOTS": 128}, num_warps=num_warps))
    columns, layout, wanted = scan_case(kernel, n)
    got = SCANS[kernel][0](*(column.cuda() for column in columns), **{name: t.cuda() for name, t in layout.items()})
    assert (got.cpu().double() - wanted).norm() <= 1e-4 * wanted.norm()


def test_a_call_that_keeps_the_host_busy_has_no_device_time() -> None:
    timer = GpuTimer(torch.device("cuda"))
    x = torch.zeros(1000, device="cuda")

    def slow() -> Outputs:
        time.sleep(0.1)
        return {"x": x + 1}

    assert timer.device(slow) is None
    assert timer.device(lambda: {"x": x + 1}) is not None


def test_two_runs_give_the_same_bits() -> None:
    leaves, given = packed_case([300, 7, 129], 256, 50_257, torch.bfloat16)
    first, second = (step(leaves, given, workspace_bytes=2**24) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_trainer_learns_on_a_gpu_and_repeats_itself(tmp_path: Path) -> None:
    """In bf16 autocast, with rollouts on the GPU; resuming in the middle of a cycle as on the CPU."""
    import tiny

    rows = [{"prompt": chr(97 + i % 26) * (1 + i % 5)} for i in range(32)]
    settings = {
        "use_cpu": False, "bf16": True, "per_device_train_batch_size": 32, "max_steps": 60, "learning_rate": 3e-3,
        "tau": 0.02, "value_learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 30, "logging_steps": 1,
    }  # fmt: skip
    whole = tiny.trainer(tmp_path / "whole", {"train_dataset": rows}, **settings)
    whole.train()
    scores = [logs["objective/scores"] for logs in whole.state.log_history if "objective/scores" in logs]
    assert sum(scores[-4:]) / 4 > sum(scores[:2]) / 2
    again = tiny.trainer(tmp_path / "again", {"train_dataset": rows}, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-30"))
    assert tiny.losses(again) == pytest.approx(tiny.losses(whole), rel=1e-2)


def test_impossible_tokens_are_nan_or_under_klq_check_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(4, 64, device="cuda"), torch.randn(100, 64, device="cuda")
    actions = torch.tensor([3, 100, -1, 99], device="cuda")
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device="cuda")
    out = klq_kernels.linear_logprobs(hidden, weight, actions, cu_seqlens=cu_seqlens).logprobs
    assert out.isnan().tolist() == [False, True, True, False]
    monkeypatch.setenv("KLQ_CHECK", "1")
    with pytest.raises(ValueError, match="actions"):
        klq_kernels.linear_logprobs(hidden, weight, actions, cu_seqlens=cu_seqlens)
