"""Each Triton kernel against float64 arithmetic: on the GPU where there is one, else under Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_kernels.py     (test_interpreter.py does so in the suite)

The interpreter is slow, so there blocks are shrunk: many tiles, tails and look-backs at a few hundred elements. It
folds scans sequentially and would not notice a combine that is not associative; that is proved on its own below.
"""

from __future__ import annotations

import builtins
import importlib
import itertools
import os
from types import FunctionType, ModuleType, SimpleNamespace

import pytest
import sampled
import torch
from torch import Tensor

import klq_kernels
from klq_kernels import reference
from klq_kernels.backends import portable
from klq_kernels.vocabulary import chunking
from klq_kernels.vocabulary.chunks import (
    Chosen,
    Divergence,
    LossShape,
    Pair,
    Pull,
    Residuals,
    ScanTerms,
    Selection,
    States,
    Statistics,
    Sums,
    Terms,
    each,
    part,
)
from klq_kernels.vocabulary.metrics import klq_metrics
from klq_kernels.vocabulary.sampling import Entries, Sampling

pytest.importorskip("triton")

DEVICES = [
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
    ),
]
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes with NumPy, which warns of inf
]


def kernel_module(name: str) -> ModuleType:
    return importlib.import_module(f"klq_kernels.backends.triton.{name}")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Under the interpreter, blocks small enough that every loop turns more than once. Compiled kernels keep theirs: in
    a block smaller than its threads several threads hold one element, so that nothing could be written in place.
    """
    if device == "cuda" or "KLQ_PTX" in os.environ:
        return
    launch = kernel_module("launch")
    row_stats = {size: config._replace(sizes={"GROUPS": 4, "LANES": 16}) for size, config in launch.ROW_STATS.items()}
    monkeypatch.setattr(kernel_module("row_stats"), "ROW_STATS", row_stats)
    row_kl = {
        size: config._replace(sizes={"GROUPS": 4, "LANES": 16, "BLOCK": 32}) for size, config in row_stats.items()
    }
    monkeypatch.setattr(kernel_module("row_kl"), "ROW_KL", row_kl)
    few = {size: config._replace(sizes={"ENTRIES": 4, "BLOCK": 32}) for size, config in launch.SELECTED_LOGITS.items()}
    monkeypatch.setattr(kernel_module("selected_logits"), "SELECTED_LOGITS", few)
    monkeypatch.setattr(
        kernel_module("row_grad"), "ROW_GRAD_SUMS", launch.ROW_GRAD_SUMS._replace(sizes={"ROWS": 64, "BLOCK": 64})
    )
    sizes = {
        "row_grad": ("ROW_GRAD", {"BLOCK": 64}),
        "row_kl": ("ROW_KL_GRAD", {"BLOCK": 64}),
        "row_select": ("ROW_SELECT", {"GROUPS": 2, "SEGMENT": 16, "BLOCK": 4, "HITS": 2}),
        "weighted_sums": ("WEIGHTED_SUMS", {"ENTRIES": 2, "BLOCK": 32}),
        "klq_residual": ("KLQ_RESIDUAL", {"BLOCK": 16}),
        "scans": ("SCAN", {"TILE": 16, "SLOTS": 4}),
    }
    for module, (name, small) in sizes.items():
        monkeypatch.setattr(kernel_module(module), name, getattr(launch, name)._replace(sizes=small))


def logits_like_a_model(n: int, vocab: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(logits with padded rows as the driver makes them, padding poisoned; actions, every other one the likeliest)."""
    g = torch.Generator().manual_seed(seed)
    z = 3.0 * torch.randn(n, vocab, generator=g) - 1.5 * torch.log1p(torch.arange(vocab).float()) + 20.0
    z[torch.arange(n), torch.randint(vocab, (n,), generator=g)] += 15.0
    actions = torch.where(torch.arange(n) % 2 == 0, z.argmax(1), torch.randint(vocab, (n,), generator=g))
    buffer = torch.full((n, chunking.row_stride(vocab)), float("nan"), dtype=dtype, device=device)
    buffer[:, :vocab] = z.to(device, dtype)
    return buffer[:, :vocab], actions.to(device)


def z_of(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = logits.double()
    return scale * (z if softcap is None else softcap * torch.tanh(z / softcap))


def nans(n: int, device: str) -> Tensor:
    return torch.full((n,), float("nan"), device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 63, 64, 131, 200])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (1 / 0.7, 30.0)])
def test_row_stats(device: str, dtype: torch.dtype, vocab: int, scale: float, softcap: float | None) -> None:
    n = 5
    logits, actions = logits_like_a_model(n, vocab, dtype, device)
    top, log_total, logp, entropy = (nans(n, device) for _ in range(4))
    kernel_module("row_stats").row_stats(
        logits, actions, Statistics(top, log_total, logp, entropy), scale=scale, softcap=softcap
    )
    z = z_of(logits, scale, softcap)
    p = z.log_softmax(1)
    lse = scale * top.double() + log_total.double()
    torch.testing.assert_close(lse, z.logsumexp(1), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(logp.double(), p.gather(1, actions[:, None])[:, 0], rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(entropy.double(), -(p.exp() * p).sum(1), rtol=1e-5, atol=2e-5)
    again = nans(n, device)
    kernel_module("row_stats").row_stats(
        logits, actions, Statistics(top, log_total, again, None), scale=scale, softcap=softcap
    )
    assert torch.equal(again, logp)


def test_row_stats_of_impossible_tokens_and_masked_vocabulary(device: str) -> None:
    logits, actions = logits_like_a_model(4, 131, torch.float32, device)
    actions[0], actions[1] = 131, -1
    actions[2:] = 70
    logits[:, :65] = float("-inf")
    logits[3, 100] = float("nan")
    top, log_total, logp, entropy = (nans(4, device) for _ in range(4))
    kernel_module("row_stats").row_stats(
        logits, actions, Statistics(top, log_total, logp, entropy), scale=1.0, softcap=None
    )
    assert logp.isnan().tolist() == [True, True, False, True]
    z = logits[:3, 65:].double()
    torch.testing.assert_close((top + log_total)[:3].double(), z.logsumexp(1), rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(entropy[:3].double(), -(z.softmax(1) * z.log_softmax(1)).sum(1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [1e-6, 1e-9, 1e-12, 1e-30])
def test_row_stats_of_a_policy_without_entropy(device: str, temperature: float) -> None:
    logits, actions = logits_like_a_model(4, 131, torch.float32, device)
    out = Statistics(*(nans(4, device) for _ in range(4)))
    kernel_module("row_stats").row_stats(logits, actions, out, scale=1 / temperature, softcap=None)
    assert out.entropy is not None
    assert out.entropy.tolist() == [0.0] * 4
    logits[2, 100] = float("nan")
    kernel_module("row_stats").row_stats(logits, actions, out, scale=1 / temperature, softcap=None)
    assert out.entropy.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter mis-rounds bf16 stores
@pytest.mark.parametrize("vocab", [1, 64, 131])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (1 / 0.7, 30.0)])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_row_grad(
    device: str, dtype: torch.dtype, vocab: int, scale: float, softcap: float | None, with_entropy: bool
) -> None:
    n = 5
    logits, actions = logits_like_a_model(n, vocab, dtype, device)
    g, s, h = torch.randn(3, n, generator=torch.Generator().manual_seed(1)).to(device)
    raw = logits.double().requires_grad_()
    z = scale * (raw if softcap is None else softcap * torch.tanh(raw / softcap))
    logp = z.log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    taken = logp.gather(1, actions[:, None])[:, 0]
    wanted = (g.double() * taken + s.double() * z.logsumexp(1)).sum()
    if with_entropy:
        wanted = wanted + (h.double() * entropy).sum()
    wanted.backward()
    top = raw.amax(1) if softcap is None else softcap * torch.tanh(raw.amax(1) / softcap)
    normaliser = (top.detach().float(), (z.logsumexp(1) - scale * top).detach().float())
    extra = (h, entropy.detach().float()) if with_entropy else (None, None)
    kernel_module("row_grad").row_grad(
        logits, actions, Pull(*normaliser, g, s - g, *extra), logits, scale=scale, softcap=softcap
    )
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(logits.double(), raw.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab", [1, 131, 200])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("learnt", [False, True])
def test_a_bias_is_added_as_logits_are_read(
    device: str, vocab: int, softcap: float | None, bias_dtype: torch.dtype, learnt: bool
) -> None:
    """In all three row operations, as from logits that hold it already; entry by entry with the same bits."""
    n = 5
    logits, actions = logits_like_a_model(n, vocab, torch.float32, device)
    bias = torch.zeros(logits.stride(0), dtype=bias_dtype, device=device)
    bias[:vocab] = torch.randn(vocab, generator=torch.Generator().manual_seed(2)).to(device)
    if vocab > 100:
        bias[7:50] = float("-inf")
        actions[(actions >= 7) & (actions < 50)] = 60
    both = torch.full((n, logits.stride(0)), float("nan"), device=device)[:, :vocab].copy_(
        logits + bias[:vocab].float()
    )
    head = {"scale": 0.7, "softcap": softcap}
    found = []
    for rows, added in ((logits, bias), (both, None)):
        statistics = Statistics(*(nans(n, device) for _ in range(4)))
        kernel_module("row_stats").row_stats(rows, actions, statistics, **head, bias=added)
        top, log_total, logp, _ = found[0][0] if found else statistics
        g = torch.linspace(-1.0, 2.0, n, device=device)
        sampling = Sampling(6, torch.tensor(SAMPLING_SEED, device=device))
        pull, selection = Entries(n, vocab, sampling).selection(slice(0, n), Pull(top, log_total, g, -g), logp, 0.7)
        selection.values.zero_()
        selection.columns.zero_()
        kernel_module("row_select").row_select(rows, actions, pull, selection, **head, bias=added)
        sums = torch.zeros(vocab, device=device)
        kernel_module("row_grad").row_grad(rows, actions, pull, rows, sums if learnt else None, **head, bias=added)
        found.append((statistics, selection.values, selection.columns, selection.counts, rows, sums))
    (statistics, *ours), (wanted_statistics, *wanted) = found
    for vector, vector_wanted in zip(statistics, wanted_statistics, strict=True):
        assert vector.isfinite().all()
        torch.testing.assert_close(vector, vector_wanted, rtol=1e-6, atol=2e-5)
    for tensor, tensor_wanted in zip(ours, wanted, strict=True):
        assert torch.equal(tensor, tensor_wanted)


@pytest.mark.parametrize(
    ("logits_dtype", "dtype"),  # the interpreter mis-rounds bf16 stores
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float16)],
)
@pytest.mark.parametrize("vocab", [1, 64, 131])
@pytest.mark.parametrize("n", [1, 8, 11])  # rows of one group or of several, the last of which may be short
def test_sums_of_row_grad_over_rows(
    device: str, logits_dtype: torch.dtype, dtype: torch.dtype, vocab: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is as without sums, bit by bit; its sums over rows join what there is; rows beyond n stay."""
    config = kernel_module("row_grad").ROW_GRAD_SUMS
    few = config._replace(sizes=config.sizes | {"ROWS": 4})
    monkeypatch.setattr(kernel_module("row_grad"), "ROW_GRAD_SUMS", few)
    (rows, actions), (again, _) = (logits_like_a_model(n + 3, vocab, logits_dtype, device) for _ in range(2))
    logits, apart, actions = rows[:n], again[:n], actions[:n]
    found = Statistics(*(nans(n, device) for _ in range(4)))
    head = {"scale": 1 / 0.7, "softcap": 30.0}
    portable.row_stats(logits, actions, found, **head)
    g, h = torch.randn(2, n, generator=torch.Generator().manual_seed(4)).to(device)
    pull = Pull(found.top, found.log_total, g, -g, h, found.entropy)
    exact = torch.empty(n, vocab, device=device)
    portable.row_grad(logits.float(), actions, pull, exact, **head)
    kernel = kernel_module("row_grad").row_grad
    out, wanted = (x if dtype == logits_dtype else x.view(dtype)[:, :vocab] for x in (logits, apart))
    sums = torch.ones(vocab, device=device)
    kernel(logits, actions, pull, out, sums, **head)
    kernel(apart, actions, pull, wanted, **head)
    assert torch.equal(out, wanted)
    assert torch.equal(rows[n:], again[n:])
    rounded = dtype != logits_dtype  # then the gradient is read again as it was stored
    total = 1 + (out if rounded else exact).double().sum(0)
    torch.testing.assert_close(sums.double(), total, rtol=1e-5, atol=2e-5)


PAIRS = {
    "plain": Pair(1.0, None, 1.0, None, False),
    "reverse": Pair(1.0, None, 1.0, None, True),
    "capped": Pair(1 / 0.7, 30.0, 1.0, None, False),
    "capped reverse": Pair(1.0, None, 1 / 0.7, 30.0, True),
}


def divergence_of(logits: Tensor, ref_logits: Tensor, pair: Pair) -> Tensor:
    """fp64 [n]; entries that both forbid have no part in it."""
    log_p = z_of(logits, pair.scale, pair.softcap).log_softmax(1)
    log_q = z_of(ref_logits, pair.ref_scale, pair.ref_softcap).log_softmax(1)
    if pair.reverse:
        log_p, log_q = log_q, log_p
    return (log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p - log_q)).sum(1)


def two_models(
    n: int, vocab: int, dtype: torch.dtype, device: str, *, ref_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of logits of a policy and of its reference: rows 0 and 1 the same, the next two close, the others apart."""
    logits, _ = logits_like_a_model(n, vocab, dtype, device)
    ref_logits, _ = logits_like_a_model(n, vocab, dtype if ref_dtype is None else ref_dtype, device, seed=1)
    ref_logits[:2] = logits[:2]
    noise = torch.randn(2, vocab, generator=torch.Generator().manual_seed(2)).to(device)
    ref_logits[2:4] = logits[2:4] + (0.05 * noise).to(ref_logits.dtype)
    return logits, ref_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 131])
@pytest.mark.parametrize("which", PAIRS)
def test_row_kl(device: str, dtype: torch.dtype, vocab: int, which: str) -> None:
    n, pair = 6, PAIRS[which]
    logits, ref_logits = two_models(n, vocab, dtype, device, ref_dtype=torch.float32 if vocab == 131 else None)
    found = Divergence(*(nans(n, device) for _ in Divergence._fields))
    kernel_module("row_kl").row_kl(logits, ref_logits, found, pair=pair)
    for part_of, top, rest, scale, softcap in (
        (logits, found.top, found.log_total, pair.scale, pair.softcap),
        (ref_logits, found.ref_top, found.ref_log_total, pair.ref_scale, pair.ref_softcap),
    ):
        lse = scale * top.double() + rest.double()
        torch.testing.assert_close(lse, z_of(part_of, scale, softcap).logsumexp(1), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.kl.double(), divergence_of(logits, ref_logits, pair), rtol=5e-5, atol=1e-8)
    assert (found.kl >= 0).all()
    if which in ("plain", "reverse"):
        assert found.kl[:2].eq(0).all()


def test_row_kl_of_forbidden_tokens(device: str) -> None:
    """Forbidden by both: no part in it. By the second alone: infinite. A NaN logit makes its row NaN."""
    logits, ref_logits = two_models(6, 131, torch.float32, device)
    for rows in (logits, ref_logits):
        rows[:, 40:70] = float("-inf")
    for reverse in (False, True):
        first, second = (ref_logits, logits) if reverse else (logits, ref_logits)
        first[3, 80] = second[4, 90] = float("-inf")
        second[5, 3] = float("nan")
        pair = PAIRS["plain"]._replace(reverse=reverse)
        found = Divergence(*(nans(6, device) for _ in Divergence._fields))
        kernel_module("row_kl").row_kl(logits, ref_logits, found, pair=pair)
        torch.testing.assert_close(
            found.kl[:4].double(), divergence_of(logits, ref_logits, pair)[:4], rtol=5e-5, atol=1e-8
        )
        assert found.kl[4].item() == float("inf")
        assert found.kl[5].isnan()
        out = logits.clone()
        kernel_module("row_kl").row_kl_grad(out, ref_logits, found, torch.ones(6, device=device), out, pair=pair)
        assert out[:4].isfinite().all()
        assert out[:4, 40:70].eq(0).all()
        logits[3, 80] = ref_logits[3, 80] = 1.0
        logits[4, 90] = ref_logits[4, 90] = 1.0


@pytest.mark.parametrize(
    ("logits_dtype", "dtype"),  # the interpreter mis-rounds bf16 stores
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float16)],
)
@pytest.mark.parametrize("vocab", [1, 131])
@pytest.mark.parametrize("which", PAIRS)
def test_row_kl_grad(device: str, logits_dtype: torch.dtype, dtype: torch.dtype, vocab: int, which: str) -> None:
    n, pair = 6, PAIRS[which]
    logits, ref_logits = two_models(n, vocab, logits_dtype, device, ref_dtype=dtype)
    d_kl = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(device)
    raw = logits.double().requires_grad_()
    (d_kl.double() * divergence_of(raw, ref_logits, pair)).sum().backward()
    found = Divergence(*(nans(n, device) for _ in Divergence._fields))
    kernel_module("row_kl").row_kl(logits, ref_logits, found, pair=pair)
    out = logits.view(dtype)[:, :vocab]
    kernel_module("row_kl").row_kl_grad(logits, ref_logits, found, d_kl, out, pair=pair)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(out.double(), raw.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cap", [10.0, 30.0, 1000.0])
def test_soft_cap_keeps_its_digits_for_both_signs(device: str, cap: float) -> None:
    """Value and slope, relative to themselves: from where the slope is 1 to where it is 1e-14."""
    y = torch.logspace(-4, 1.2, 40, dtype=torch.float64)
    x = (cap * torch.cat((y, -y))).float().to(device)
    chosen = Chosen(States(torch.ones(1, 1, device=device), None), torch.arange(80, device=device)[None], 1)
    found, slope = torch.empty(2, 1, 80, device=device).unbind()
    kernel_module("selected_logits").selected_logits(chosen, x[:, None], None, found, slope, scale=1.0, softcap=cap)
    exact = x.double() / cap
    torch.testing.assert_close(found[0].double(), cap * exact.tanh(), rtol=4e-7, atol=0)
    # an argument of exp2 is rounded, which is as much of its result as the argument is large
    worst = ((slope[0].double() * exact.cosh() ** 2 - 1).abs() / (1 + exact.abs())).max()
    assert worst < 4e-7
    extreme = torch.tensor([1e5, float("inf")], device=device) * cap
    found, slope = torch.empty(2, 1, 4, device=device).unbind()
    chosen = chosen._replace(ids=torch.arange(4, device=device)[None])
    extreme = torch.cat((extreme, -extreme))
    kernel_module("selected_logits").selected_logits(
        chosen, extreme[:, None], None, found, slope, scale=1.0, softcap=cap
    )
    assert found[0].tolist() == [cap, cap, -cap, -cap]
    assert slope.eq(0).all()


SAMPLING_SEED = 11


def select(
    logits: Tensor,
    actions: Tensor,
    g: Tensor,
    samples: int,
    scale: float,
    softcap: float | None,
    *,
    room: int | None = None,
) -> tuple[Tensor, Selection, float]:
    """(estimate [n, V] as the kernel's entries make it, what it wrote, threshold), by log-probabilities of weight g."""
    n, vocab = logits.shape
    z = z_of(logits, scale, softcap)
    logp = z.log_softmax(1).gather(1, actions[:, None].clamp(0, vocab - 1))[:, 0].float()
    top = (logits.double() if softcap is None else softcap * torch.tanh(logits.double() / softcap)).amax(1).float()
    log_total = (z.logsumexp(1) - scale * top.double()).float()
    sampling = Sampling(samples, torch.tensor(SAMPLING_SEED, device=logits.device))
    pull, selection = Entries(n, vocab, sampling).selection(slice(0, n), Pull(top, log_total, g, -g), logp, scale)
    if room is not None:
        selection.offsets.copy_(torch.arange(n + 1, device=logits.device) * room)
    selection.values.fill_(float("nan"))
    kernel_module("row_select").row_select(logits, actions, pull, selection, scale=scale, softcap=softcap)
    estimate = torch.zeros(n, vocab, device=logits.device)
    for t, (begin, count) in enumerate(zip(selection.offsets.tolist(), selection.counts.tolist(), strict=False)):
        columns = selection.columns[begin : begin + count].long()
        assert (columns.diff() > 0).all()  # in the order of the vocabulary
        estimate[t, columns] = selection.values[begin : begin + count]
    return estimate, selection, float(selection.threshold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 131, 1000])
@pytest.mark.parametrize("kind", ["peaked", "tied"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (1 / 0.7, 30.0)])
def test_row_select(
    device: str, dtype: torch.dtype, vocab: int, kind: str, scale: float, softcap: float | None
) -> None:
    n = 5
    z, actions = (tensor.to(device) for tensor in sampled.rows(kind, n, vocab))
    buffer = torch.full((n, chunking.row_stride(vocab)), float("nan"), dtype=dtype, device=device)
    logits = buffer[:, :vocab].copy_(z)
    g = torch.tensor([1.0, -0.5, 0.0, 2.0, -3.0], device=device)
    estimate, selection, threshold = select(logits, actions, g, 6, scale, softcap)
    raw = logits.double().requires_grad_()
    capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    logp = (scale * capped).log_softmax(1).gather(1, actions[:, None])[:, 0]
    (logp * g).sum().backward()
    assert raw.grad is not None
    sampled.assert_selected(estimate.cpu(), raw.grad.cpu(), actions.cpu(), threshold, SAMPLING_SEED)
    room = selection.offsets.diff()
    assert (selection.counts <= room).all()
    assert (selection.counts >= 1).all()


def test_row_select_of_rows_that_are_not_finite(device: str) -> None:
    """The entry of the taken token, or of the nearest where there is none, is NaN, and no other is kept."""
    logits, actions = logits_like_a_model(4, 131, torch.float32, device)
    actions[0], actions[1] = 131, -1
    g = torch.tensor([1.0, 1.0, float("nan"), float("inf")], device=device)
    estimate, selection, _ = select(logits, actions, g, 6, 1.0, None)
    assert selection.counts.tolist() == [1, 1, 1, 1]
    assert estimate[torch.arange(4), actions.clamp(0, 130)].isnan().all()


def test_row_select_without_enough_room_is_nan(device: str) -> None:
    """It cannot happen in a call; if it did, the result would not be silently wrong."""
    z, actions = sampled.rows("flat", 4, 500)
    logits = torch.nn.functional.pad(z, (0, 12)).to(device)[:, :500]
    g = torch.ones(4, device=device)
    _, selection, _ = select(logits, actions.to(device), g, 40, 1.0, None, room=3)
    assert selection.counts.tolist() == [3] * 4
    assert selection.values[:12].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])  # the interpreter mis-rounds bf16 stores
@pytest.mark.parametrize("width", [1, 16, 100, 1500])
def test_weighted_sums(device: str, dtype: torch.dtype, out_dtype: torch.dtype, width: int) -> None:
    """Of no rows, of some, of more than are taken at a time; entries that no sum names are not read."""
    g = torch.Generator().manual_seed(0)
    counts = torch.tensor([0, 1, 2, 5, 9, 0, 40])
    ends = (counts + 3).cumsum(0)  # with entries in between that belong to none
    begins = ends - counts
    index = torch.randint(30, (int(ends[-1]) + 3,), generator=g).int()
    values = torch.randn(index.numel(), generator=g)
    owned = torch.zeros(index.numel(), dtype=torch.bool)
    for begin, end in zip(begins, ends, strict=True):
        owned[begin:end] = True
    index[~owned], values[~owned] = 2**30, float("nan")
    source = torch.randn(30, width, generator=g).to(dtype)
    out = torch.full((len(counts), width), float("nan"), dtype=out_dtype, device=device)
    sums = Sums(begins, ends, index, values)
    kernel_module("weighted_sums").weighted_sums(each(sums, lambda t: t.to(device)), source.to(device), out)
    wanted = torch.stack(
        [values[b:e].double() @ source[index[b:e].long()].double() for b, e in zip(begins, ends, strict=True)]
    )
    rounding = torch.finfo(out_dtype).eps
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=2 * rounding + 1e-5, atol=1e-5)


def test_a_kernel_refuses_what_does_not_lie_side_by_side(device: str) -> None:
    bounds = torch.tensor([0, 2], device=device)
    sums = Sums(bounds[:1], bounds[1:], torch.zeros(2, dtype=torch.int32, device=device), torch.ones(2, device=device))
    source, out = torch.ones(4, 3, device=device), torch.zeros(1, 3, device=device)
    kernel_module("weighted_sums").weighted_sums(sums, source, out)
    with pytest.raises(RuntimeError, match="contiguous"):
        kernel_module("weighted_sums").weighted_sums(sums, source.T.contiguous().T, out)


def test_a_sampled_gradient_reads_a_turned_weight(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLQ_BACKEND", "triton")
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).to(device) for shape in ((6, 8), (40, 8)))
    actions = torch.randint(40, (6,), generator=g).to(device)
    ends = torch.tensor([0, 6], dtype=torch.int32, device=device)
    found = []
    for rows in (weight, weight.T.contiguous().T):
        leaf = hidden.clone().requires_grad_()
        options = {"gradient": "sampled", "samples": 40, "seed": 1}
        klq_kernels.linear_logprobs(leaf, rows, actions, cu_seqlens=ends, **options).logprobs.sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)])
@pytest.mark.parametrize("width", [1, 100, 272])
@pytest.mark.parametrize(("k", "atoms", "full"), [(1, 1, False), (5, 1, True), (3, 7, True)])
def test_selected_logits(
    device: str, dtypes: tuple[torch.dtype, torch.dtype], width: int, k: int, atoms: int, full: bool
) -> None:
    """Of fewer entries than a program takes and of more; bare, and with positions, bias and soft cap."""
    g = torch.Generator().manual_seed(width)
    hidden = torch.randn(6, width, generator=g).to(device, dtypes[0])
    weight = torch.randn(11 * atoms, width, generator=g).to(device, dtypes[1])
    positions = torch.tensor([5, 0, 3, 4], device=device) if full else None
    bias = torch.randn(11 * atoms, generator=g).to(device) if full else None
    ids = torch.randint(11, (4 if full else 6, k), generator=g).to(device)
    ids[1, 0], ids[2, -1] = -1, 11
    head = {"scale": 1 / 0.7, "softcap": 9.0 if full else None}
    out = torch.zeros(*ids.shape, atoms, device=device)
    slope = torch.full_like(out, float("nan")) if full else None
    kernel_module("selected_logits").selected_logits(
        Chosen(States(hidden, positions), ids, atoms), weight, bias, out, slope, **head
    )
    assert out[1, 0].isnan().all()
    assert out[2, -1].isnan().all()
    states = hidden if positions is None else hidden[positions]
    rows = ids.clamp(0, 10)[..., None] * atoms + torch.arange(atoms, device=device)
    z = torch.einsum("tkah,th->tka", weight[rows].double(), states.double()) + (0 if bias is None else bias[rows])
    there = out.isfinite()
    assert int((~there).sum()) == 2 * atoms
    torch.testing.assert_close(out.double()[there], z_of(z, **head)[there], rtol=1e-5, atol=2e-5)
    if slope is not None:
        torch.testing.assert_close(slope.double(), 1 - torch.tanh(z / 9.0).square(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 131, 9000])  # the last: more blocks than one, each written over those before it
def test_row_grad_in_a_narrower_dtype(device: str, dtype: torch.dtype, vocab: int) -> None:
    """It fills the first half of each row of logits, and is the wide one, rounded."""
    n = 3
    logits, actions = logits_like_a_model(n, vocab, torch.float32, device)
    wide = logits.clone()
    top, log_total = logits.amax(1), (logits - logits.amax(1, keepdim=True)).logsumexp(1)
    g = torch.tensor([0.5, -2.0, 1.0], device=device)
    pull, head = Pull(top, log_total, g, -g), {"scale": 1.0, "softcap": None}
    narrow = logits.view(dtype)[:, :vocab]
    kernel_module("row_grad").row_grad(logits, actions, pull, narrow, **head)
    kernel_module("row_grad").row_grad(wide, actions, pull, wide, **head)
    assert narrow.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(narrow.float(), wide, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["l2", "huber", "value_clipped", "ratio_clipped", "double_clipped"])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("n", [1, 5, 5000])
def test_klq_metrics(device: str, loss_type: str, on_policy: bool, extras: bool, n: int) -> None:
    logp, values, old_logp, old_values, advantages, ref_logp, entropy = torch.randn(
        7, n, generator=torch.Generator().manual_seed(n)
    ).to(device)
    old_logp, ref_logp = logp + 0.3 * old_logp, logp + 0.01 * ref_logp  # changes small and large
    old = (None, None) if on_policy else (old_logp, old_values)
    terms = Terms(logp, values, *old, advantages, None)
    shape = LossShape(0.3, 0.8, loss_type, 1.0, 0.2, 0.2)
    decay = torch.where(torch.arange(n, device=device) % 3 == 2, 0.0, 0.9)
    decay[-1] = 0.0
    given = {
        "ref_logp": ref_logp if extras else None,
        "entropy": entropy if extras else None,
        "decay_next": decay if on_policy else None,
    }
    loss = torch.tensor(1.25, device=device)
    found = klq_metrics(kernel_module("klq_metrics"), loss, terms, shape, **given)
    exact = {name: None if x is None else x.double().cpu() for name, x in given.items()}
    wanted = klq_metrics(portable, loss.double().cpu(), each(terms, lambda x: x.double().cpu()), shape, **exact)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("vocab", [1, 131, 40_000])
@pytest.mark.parametrize("loss_type", ["l2", "double_clipped"])
@pytest.mark.parametrize("weighted", [False, True])
def test_row_update(device: str, vocab: int, loss_type: str, weighted: bool) -> None:
    """It is ``row_stats``, ``klq_residual`` and ``row_grad``, one after the other."""
    n = 3
    (rows, actions), (right_rows, _) = (logits_like_a_model(n, vocab, torch.bfloat16, device) for _ in range(2))
    columns = torch.randn(5, n, generator=torch.Generator().manual_seed(2)).to(device)
    values, old_logp, old_values, advantages, weights = columns
    shape = LossShape(0.3, 0.8, loss_type, 1.0, 0.2, 0.2)
    grad_scale = torch.tensor(0.25, device=device)
    scale = 1 / 0.7
    head = {"scale": scale, "softcap": None}

    def bundles() -> tuple[Terms, Statistics, Residuals]:
        top, log_total, logp, losses, d_logp, d_values = (nans(n, device) for _ in range(6))
        terms = Terms(logp, values, old_logp, old_values, advantages, weights if weighted else None)
        found = Statistics(top, log_total, logp, None)
        return terms, found, Residuals(losses, d_logp, d_values)

    terms, found, residuals = bundles()
    kernel_module("row_update").row_update(
        rows, actions, terms, found, residuals, grad_scale=grad_scale, shape=shape, scale=scale
    )
    right = bundles()
    portable.row_stats(right_rows, actions, right[1], **head)
    portable.klq_residual(right[0], right[2], grad_scale=grad_scale, shape=shape)
    d_logp = right[2].d_logp
    pull = Pull(right[1].top, right[1].log_total, d_logp, -d_logp)
    portable.row_grad(right_rows, actions, pull, right_rows, **head)
    for ours, wanted in zip((found, residuals), right[1:], strict=True):
        for a, b in zip(ours, wanted, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows, right_rows, rtol=4e-2, atol=2e-3)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float32,) * 2])
@pytest.mark.parametrize("n", [1, 1000, 8192 * 2 + 5])
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_scale(device: str, dtypes: tuple[torch.dtype, torch.dtype], n: int, factor: float) -> None:
    given, wanted = dtypes
    x = torch.randn(n, device=device).to(given)
    out = nans(n, device).to(wanted)
    before, scalar = x.clone(), torch.tensor(factor, device=device)
    kernel_module("scale").scale(x, scalar, out)
    assert torch.equal(x, before)
    torch.testing.assert_close(out, (before.float() * factor).to(wanted))
    if given == wanted:
        kernel_module("scale").scale(x, scalar, x)
        assert torch.equal(x, out)


@pytest.mark.parametrize("scale", [1.0, 1 / 0.7])
def test_the_gradient_of_a_likely_token_survives_large_logits(device: str, scale: float) -> None:
    """1 - p from a logsumexp of 200 rounded to fp32 would be off by 1e-5."""
    logits = torch.full((9, 131), -9.0, device=device)
    logits[:, 70] = 200.0 + torch.arange(9, device=device) / 16
    logits[:, 100] = 194.0
    actions, one = torch.full((9,), 70, device=device), torch.ones(9, device=device)
    gold = 1 - (scale * logits.double()).softmax(1)[:, 70]
    top, log_total, logp = (nans(9, device) for _ in range(3))
    head = {"scale": scale, "softcap": None}
    kernel_module("row_stats").row_stats(logits, actions, Statistics(top, log_total, logp, None), **head)
    kernel_module("row_grad").row_grad(logits, actions, Pull(top, log_total, one, -one), logits, **head)
    torch.testing.assert_close(logits[:, 70].double(), scale * gold, rtol=0, atol=2e-7)


@pytest.mark.parametrize("loss_type", ["l2", "huber", "value_clipped", "ratio_clipped", "double_clipped"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_klq_residual(device: str, loss_type: str, on_policy: bool) -> None:
    n = 50
    g = torch.Generator().manual_seed(0)
    logp, values, old_logp, old_values, advantages, weights = (0.5 * torch.randn(6, n, generator=g)).to(device)
    shape = {
        "tau": 0.3,
        "alpha": 0.8,
        "loss_type": loss_type,
        "huber_delta": 0.4,
        "value_clip": 0.2,
        "log_ratio_clip": 0.3,
    }
    if on_policy:
        old_logp, old_values = logp, values
    leaves = [t.double().requires_grad_() for t in (logp, values)]
    wanted = weights.double() * reference.klq_residual_loss(
        leaves[0] - old_logp.double(), leaves[1] - old_values.double(), advantages.double(), **shape
    )
    d_wanted = torch.autograd.grad(wanted.sum(), leaves)
    found = Residuals(*(nans(n, device) for _ in range(3)))
    old = (None, None) if on_policy else (old_logp, old_values)
    scale = torch.full((), 2.0, device=device)
    kernel_module("klq_residual").klq_residual(
        Terms(logp, values, *old, advantages, weights), found, grad_scale=scale, shape=LossShape(**shape)
    )
    torch.testing.assert_close(found.losses.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    for got, d in zip(found[1:], d_wanted, strict=True):
        torch.testing.assert_close(got.double(), 2.0 * d, rtol=1e-5, atol=1e-6)


CUTS = {  # lengths of the sequences: one long; many short with empty ones; single tokens; a mixture
    "one": [150],
    "short": [3, 0, 5, 1, 0, 0, 7, 2, 16, 0, 15, 17, 1],
    "ones": [1] * 40,
    "mixed": [50, 1, 0, 33, 70],
    "tiny": [1],
}


def cut(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


@pytest.mark.parametrize("lengths", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("one_decay", [False, True])
def test_reverse_scan(device: str, lengths: list[int], masked: bool, one_decay: bool) -> None:
    n = sum(lengths)
    g = torch.Generator().manual_seed(n)
    delta = torch.randn(n, generator=g).to(device)
    decay = (torch.full((1,), 0.95) if one_decay else torch.rand(n, generator=g) * 1.1).to(device)
    mask = (torch.rand(n, generator=g) < 0.6).to(device) if masked else None
    cu_seqlens = cut(lengths, device)
    wanted = reference.reverse_scan(delta.double(), decay.double().expand(n), mask=mask, cu_seqlens=cu_seqlens)
    out = nans(n, device)
    noisy = delta if mask is None else delta.masked_fill(~mask, float("nan"))
    kernel_module("scans").reverse_scan(noisy, decay, mask, cu_seqlens, out)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_lambda_errors(device: str, lengths: list[int], masked: bool, full: bool) -> None:
    n, batch = sum(lengths), len(lengths)
    g = torch.Generator().manual_seed(n)
    logp, ref, values, rewards = torch.randn(4, n, generator=g).to(device)
    trace = torch.rand(n, generator=g).to(device)
    bootstrap, scores = torch.randn(2, batch, generator=g).to(device)
    mask = (torch.rand(n, generator=g) < 0.6).to(device) if masked else None
    cu_seqlens = cut(lengths, device)
    tau, gamma, lam = (0.3, 0.99, 0.9) if full else (0.3, 1.0, 1.0)
    q = values.double() + tau * (logp.double() - ref.double()) if full else values.double()
    wanted = reference._lambda_errors(
        q, values.double(), rewards.double() if full else torch.zeros(n, device=device).double(),
        gamma=gamma, lam=lam, bootstrap_values=bootstrap.double() + scores.double() / gamma,
        trace=trace.double() if full else None, mask=mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    out = nans(n, device)
    tail = gamma * bootstrap + scores
    terms = ScanTerms(logp, ref, values, rewards, trace) if full else ScanTerms(None, None, values, None, None)
    kernel_module("scans").lambda_errors(terms, tail, mask, cu_seqlens, out, tau=tau, gamma=gamma, lam=lam)
    # Beyond the last token S = gamma * bootstrap + score, so a score acts as a bootstrap value of score / gamma.
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("size", [7, 16, 40])
def test_lambda_errors_carries_over_pieces(device: str, size: int) -> None:
    """Reverse-time pieces with a carry give what one piece gives, wherever sequences are cut."""
    lengths = CUTS["mixed"]
    n = sum(lengths)
    g = torch.Generator().manual_seed(3)
    terms = ScanTerms(*torch.randn(4, n, generator=g).to(device), None)
    tail = torch.randn(len(lengths), generator=g).to(device)
    cu_seqlens = cut(lengths, device)
    settings = {"tau": 0.3, "gamma": 1.0, "lam": 0.95}
    scans = kernel_module("scans")
    whole, pieces = nans(n, device), nans(n, device)
    scans.lambda_errors(terms, tail, None, cu_seqlens, whole, **settings)
    carry = torch.zeros(1, device=device)
    for start in reversed(range(0, n, size)):
        piece = slice(start, min(start + size, n))
        scans.lambda_errors(
            part(terms, piece), tail, None, cu_seqlens, pieces[piece], first_row=start, carry=carry, **settings
        )
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


def test_a_broken_sequence_stays_alone(device: str) -> None:
    """inf and NaN of one sequence reach neither neighbour (a cut is a choice, not a multiplication by 0)."""
    cu_seqlens = cut([20, 20, 20], device)
    delta = torch.randn(60, generator=torch.Generator().manual_seed(0)).to(device)
    decay = torch.full((60,), 0.9, device=device)
    clean, dirty = nans(60, device), nans(60, device)
    scans = kernel_module("scans")
    scans.reverse_scan(delta, decay, None, cu_seqlens, clean)
    delta[25], delta[30], decay[22] = float("nan"), float("inf"), float("inf")
    scans.reverse_scan(delta, decay, None, cu_seqlens, dirty)
    assert torch.equal(clean[:20], dirty[:20])
    assert torch.equal(clean[40:], dirty[40:])
    assert not dirty[20:26].isfinite().all()


def test_the_combine_is_associative(device: str) -> None:
    """(x . y) . z = x . (y . z) exactly over small integers, closed stretches included: scans may split anywhere."""
    if device == "cuda":
        pytest.skip("algebra, proved once on the CPU")
    in_torch = SimpleNamespace(where=torch.where, fma=lambda x, y, z: x * y + z)
    body = FunctionType(kernel_module("scans").compose.fn.__code__, {"tl": in_torch, "__builtins__": builtins})
    numbers = torch.cartesian_prod(*[torch.tensor([-2.0, 0.0, 1.0, 3.0])] * 6).T

    def join(later: tuple[Tensor, Tensor], earlier: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return body(*later, *earlier)

    x, y, z = ((numbers[2 * i], numbers[2 * i + 1]) for i in range(3))
    left, right = join(z, join(y, x)), join(join(z, y), x)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    a, b = join(y, x)
    assert not torch.equal(a, join(x, y)[0])  # and not commutative: the order of operands matters
    assert torch.equal(b, x[1] * y[1])


@pytest.mark.parametrize("on_policy", [False, True])
def test_fused_loss_on_these_kernels(device: str, on_policy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole pass, chunks cutting sequences, against the same pass in plain PyTorch."""
    g = torch.Generator().manual_seed(0)
    batch, length, width, vocab = 3, 9, 16, 131
    hidden, weight = (torch.randn(*s, generator=g).to(device) for s in ((batch, length, width), (vocab, width)))
    actions = torch.randint(vocab, (batch, length), generator=g).to(device)
    values, ref = torch.randn(2, batch, length, generator=g).to(device)
    rewards = torch.randn(batch, generator=g).to(device)
    mask = (torch.rand(batch, length, generator=g) < 0.7).to(device)
    given = {"ref_logprobs": ref, "rewards": rewards}
    if not on_policy:
        given = {"targets": klq_kernels.klq_targets(ref - 0.1, ref, values, rewards, mask=mask)}

    def run(backend: str) -> list[Tensor]:
        monkeypatch.setenv("KLQ_BACKEND", backend)
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, values)]
        out = klq_kernels.fused_klq_loss(
            leaves[0],
            leaves[1],
            actions,
            leaves[2],
            mask=mask,
            workspace_bytes=4 * 192 * 5,
            return_entropy=True,
            **given,
        )
        return [out.loss, *torch.autograd.grad(out.loss, leaves), *out.metrics.values()]

    for ours, plain in zip(run("triton"), run("torch"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
