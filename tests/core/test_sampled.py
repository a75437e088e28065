"""The sampled gradient: what ``reference.sampled_gradient`` promises, of the reference and of every backend.

The gradient by the logits itself is seen through a head whose hidden states hold a unit matrix: the weight's gradient
in those columns is the gradient by the logits, transposed. The other columns and the hidden states' own gradient then
have to be its products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LOSS_TYPES, assert_same_bits, differentiate, make_case, ragged_mask, workspace_for
from hypothesis import given
from hypothesis import strategies as st
from sampled import KINDS, assert_selected, rows, threshold_of
from torch import Tensor

from klq_kernels import fused_klq_loss, linear_logprobs, reference
from klq_kernels.vocabulary.sampling import uniform_bits

N, WIDTH = 24, 8
SAMPLED: dict[str, Any] = {"gradient": "sampled", "samples": 8, "seed": 5}


def dense_rows(kind: str, vocab: int = 101, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(the exact gradient by the logits of a weighted log-probability, float64 [N, V]; actions)."""
    logits, actions = rows(kind, N, vocab, seed)
    g = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    others = (-g[:, None] * logits.double().softmax(1)).scatter(1, actions[:, None], 0.0)
    return others.scatter(1, actions[:, None], -others.sum(1, keepdim=True)), actions


# ---- the reference --------------------------------------------------------------------------------------------------


def estimates(dense: Tensor, actions: Tensor, eps: Tensor, sample: Callable[..., Tensor], grid: int) -> list[Tensor]:
    """Of a grid of uniform numbers, whose mean is the expectation to within 1 / grid."""
    points = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    return [sample(dense, actions, eps, u.expand(len(dense))) for u in points]


def biased_by(factor: float) -> Callable[..., Tensor]:
    """The reference with probabilities off by a factor."""

    def sample(dense: Tensor, actions: Tensor, eps: Tensor, uniforms: Tensor) -> Tensor:
        small = dense.abs() < eps
        small.scatter_(1, actions[:, None], False)
        off = torch.where(small, dense * factor, dense)
        kept = reference.sampled_gradient(off, actions, eps, uniforms)
        return torch.where(small & (kept != 0), dense.sign() * eps, torch.where(small, 0.0, dense))

    return sample


def is_unbiased(dense: Tensor, actions: Tensor, eps: Tensor, sample: Callable[..., Tensor], grid: int = 2048) -> bool:
    """Whether the mean over the grid is ``dense``, entry by entry: each crossing moves by one point at most."""
    mean = sum(estimates(dense, actions, eps, sample, grid)) / grid
    return bool(((mean - dense).abs() <= 2 * eps / grid + 1e-12).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [2, 8])
@pytest.mark.runs("one process", "sampled gradient")
def test_the_reference_keeps_its_promises(kind: str, samples: int) -> None:
    dense, actions = dense_rows(kind)
    eps = reference.sampling_threshold(dense, actions, samples)
    assert is_unbiased(dense, actions, eps, reference.sampled_gradient)
    off = dense.scatter(1, actions[:, None], 0.0)
    small = torch.where(off.abs() < eps, off, 0.0)
    squares = kept = torch.zeros((), dtype=torch.float64)
    every = estimates(dense, actions, eps, reference.sampled_gradient, 256)
    for estimate in every:
        chosen = torch.where(small != 0, estimate, 0.0)
        count, expected = (chosen != 0).sum(1), small.abs().sum(1) / eps
        assert ((count - expected).abs() < 1 + 1e-9).all()
        assert ((estimate.sum(1) - dense.sum(1)).abs() < eps * (1 + 1e-9)).all()
        squares = squares + (estimate - dense).square().sum() / len(every)
        kept = kept + (estimate != 0).sum() / (len(every) * N)
    assert squares <= dense.square().sum() / samples
    assert kept <= samples + 1 + 1 / len(every)
    exact = (eps * small.abs() - small.square()).sum()
    assert abs(squares - exact) <= 0.05 * exact + 4 * N * eps.square() / len(every)


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_a_planted_bias_is_caught(factor: float) -> None:
    dense, actions = dense_rows("flat")
    eps = reference.sampling_threshold(dense, actions, 8)
    assert is_unbiased(dense, actions, eps, biased_by(1.0))
    assert not is_unbiased(dense, actions, eps, biased_by(factor))


# ---- every backend --------------------------------------------------------------------------------------------------


def gradients(
    logits: Tensor,
    actions: Tensor,
    g: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Tensor]:
    """Of sum(g * logp) by the logits (``by_logits``), and by the further columns and the hidden states."""
    r = torch.Generator().manual_seed(3)
    n, vocab = logits.shape
    extra_hidden, extra_weight = torch.randn(n, WIDTH, generator=r), torch.zeros(vocab, WIDTH)
    hidden = torch.cat([torch.eye(n), extra_hidden], 1).to(device, dtype).requires_grad_()
    weight = torch.cat([logits.T, extra_weight], 1).to(device, dtype).requires_grad_()
    bias = torch.zeros(vocab, device=device, requires_grad=True)
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32, device=device)
    out = linear_logprobs(hidden, weight, actions.to(device), bias=bias, cu_seqlens=cu_seqlens, **options)
    (out.logprobs * g.to(device)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    return {
        "by_logits": weight.grad[:, :n].T.cpu().float(),
        "extra": weight.grad[:, n:].cpu().float(),
        "bias": bias.grad.cpu(),
        "hidden": hidden.grad.cpu().float(),
        "weight": weight.detach().cpu().float(),
        "extra_hidden": extra_hidden.to(dtype).float(),
        "logp": out.logprobs.detach().cpu(),
    }


def weights_of(n: int, seed: int = 1) -> Tensor:
    g = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    g[::5] = 0.0
    return g


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 2, 131, 1000])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 30.0)])
def test_the_kept_entries_are_those_of_the_reference(
    kind: str, vocab: int, temperature: float, softcap: float | None, device: torch.device
) -> None:
    logits, actions = rows(kind, N, vocab)
    if kind == "masked":  # a unit matrix times -inf is NaN
        logits = logits.clamp(min=-1e30)
    g = weights_of(N)
    head = {"temperature": temperature, "softcap": softcap}
    raw = logits.double().requires_grad_()
    logp = reference.linear_logprobs(
        torch.eye(N, dtype=torch.float64), raw.T, actions, temperature=temperature, softcap=softcap
    ).logprobs
    (logp * g).sum().backward()
    found = gradients(logits, actions, g, device=device, **head, **SAMPLED)
    eps = threshold_of(g, logp.detach(), SAMPLED["samples"], 1 / temperature)
    assert raw.grad is not None
    assert_selected(found["by_logits"], raw.grad, actions, eps, SAMPLED["seed"])
    estimate = found["by_logits"].double()
    extra = estimate.T @ found["extra_hidden"].double()
    torch.testing.assert_close(found["extra"].double(), extra, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["bias"].double(), estimate.sum(0), rtol=1e-4, atol=1e-5)
    if kind != "masked":
        wanted = estimate @ found["weight"].double()
        torch.testing.assert_close(
            found["hidden"].double(), wanted, rtol=1e-4, atol=1e-5 * float(logits.abs().max()) + 1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    logits, actions = rows("peaked", N, 300)
    logits = logits.to(dtype).float()
    g = weights_of(N)
    found = gradients(logits, actions, g, device=device, dtype=dtype, **SAMPLED)
    exact = -g.double()[:, None] * logits.double().softmax(1)
    exact.scatter_add_(1, actions[:, None], g.double()[:, None])
    eps = threshold_of(g, found["logp"], SAMPLED["samples"])
    rounding = torch.finfo(dtype).eps
    estimate = found["by_logits"].double()
    assert_selected(estimate, exact, actions, eps, SAMPLED["seed"], exactness=2 * rounding)
    wanted = estimate.T @ found["extra_hidden"].double()
    torch.testing.assert_close(found["extra"].double(), wanted, rtol=3 * rounding, atol=3 * rounding)


def test_the_mean_over_seeds_is_the_dense_gradient(device: torch.device) -> None:
    """Every entry to five standard errors, whose variance is known; as strict as a bias of 2% is large."""
    seeds, samples = 800, 4
    logits, actions = rows("flat", N, 60)
    g = torch.ones(N)
    dense = gradients(logits, actions, g, device=device)["by_logits"].double()
    eps = threshold_of(g, logits.double().log_softmax(1).gather(1, actions[:, None])[:, 0], samples)
    drawn = [
        gradients(logits, actions, g, device=device, gradient="sampled", samples=samples, seed=seed)["by_logits"]
        for seed in range(seeds)
    ]
    mean = torch.stack(drawn).double().mean(0)
    spread = (dense.abs() * eps - dense.square()).clamp(min=0).div(seeds).sqrt()
    off = torch.ones_like(dense, dtype=torch.bool).scatter_(1, actions[:, None], False)
    assert ((mean - dense).abs() <= 5 * spread + 1e-6)[off].all()
    total = (mean / dense)[off].mean() - 1  # all entries together
    error = (spread / dense.abs())[off].square().sum().sqrt() / off.sum()
    assert abs(total) <= 5 * error
    assert 5 * error < 0.02  # so that a bias of 2% would have been seen
    second = torch.stack([(d.double() - dense).square().sum() for d in drawn]).mean()
    assert second <= dense.square().sum() / samples


def test_a_seed_decides(device: torch.device) -> None:
    logits, actions = rows("peaked", N, 500)

    def drawn(seed: Any) -> Tensor:
        g = weights_of(N)
        return gradients(logits, actions, g, device=device, gradient="sampled", samples=8, seed=seed)["by_logits"]

    first = drawn(3)
    assert torch.equal(first, drawn(3))
    assert torch.equal(first, drawn(torch.tensor(3)))
    assert torch.equal(first, drawn(torch.tensor([3], device=device)))
    assert not torch.equal(first, drawn(4))
    assert not torch.equal(drawn(-1), drawn(2**63 - 1))
    torch.manual_seed(7)
    one, two = drawn(None), drawn(None)
    assert not torch.equal(one, two)
    torch.manual_seed(7)
    assert torch.equal(one, drawn(None))
    assert torch.equal(two, drawn(None))


def test_uniform_numbers_are_uniform() -> None:
    bits = [uniform_bits(torch.tensor(seed), 4096).long() & 0xFFFFFFFF for seed in (0, 1, 2**40, -5)]
    numbers = torch.stack(bits).double() / 2.0**32
    assert (numbers.mean(1) - 0.5).abs().max() < 4 / math.sqrt(12 * 4096)
    counts = torch.stack([n.histc(64, 0, 1) for n in numbers])
    assert ((counts - 64).square().sum(1) / 64 < 63 + 5 * math.sqrt(126)).all()  # chi squared of 63 degrees of freedom
    together = torch.corrcoef(torch.cat([numbers, numbers.roll(1, 1)]))
    assert together.fill_diagonal_(0).abs().max() < 5 / math.sqrt(4096)


def test_the_entries_do_not_depend_on_threads_or_layout(device: torch.device) -> None:
    case = make_case(ragged_mask(5, 40), vocab=700, width=24, device=device).with_exact_logits()

    def run(which: Any) -> Any:
        given = which.loss_arguments(on_policy=True)
        return differentiate(fused_klq_loss, which, **given, gradient="sampled", samples=6, seed=2)

    padded, threads = run(case), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        other = run(case)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(padded, other)
    packed = run(case.packed())
    for name in ("weight", "bias"):
        torch.testing.assert_close(padded.gradients[name], packed.gradients[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(padded.gradients["hidden"][case.valid], packed.gradients["hidden"], rtol=1e-4, atol=1e-6)
    assert (padded.gradients["hidden"][~case.valid] == 0).all()
    assert padded.metrics["gradient_entries"] == packed.metrics["gradient_entries"]


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_metrics_are_those_of_the_dense_call(loss_type: str, on_policy: bool, device: torch.device) -> None:
    case = make_case(ragged_mask(4, 20), vocab=260, device=device)
    given = {**case.loss_arguments(on_policy=on_policy, weights=True), "loss_type": loss_type, "denom": 7.0}
    dense = differentiate(fused_klq_loss, case, **given)
    mean, seeds = None, 60
    for seed in range(seeds):
        found = differentiate(fused_klq_loss, case, **given, gradient="sampled", samples=16, seed=seed)
        kept = found.metrics.pop("gradient_entries")
        assert 1 <= kept <= 17
        torch.testing.assert_close(found.loss, dense.loss)
        assert found.metrics.keys() == dense.metrics.keys()
        for name, value in dense.metrics.items():
            torch.testing.assert_close(found.metrics[name], value, msg=lambda text, n=name: f"{n}: {text}")
        torch.testing.assert_close(found.gradients["values"], dense.gradients["values"])
        mean = found.gradients if mean is None else {n: mean[n] + g for n, g in found.gradients.items()}
    assert mean is not None
    for name in ("hidden", "weight", "bias"):
        error = (mean[name].double() / seeds - dense.gradients[name].double()).norm() / dense.gradients[name].norm()
        assert error < 2 * 0.25 / math.sqrt(seeds) + 1e-4, name  # the bound, of 16 samples, leaves a single one 0.25


def test_several_chunks(device: torch.device) -> None:
    """Each has a threshold of its own; a chunk's logits are read before the next ones take their place."""
    case = make_case(ragged_mask(5, 40), vocab=500, width=20, device=device)
    given = case.loss_arguments(on_policy=True)
    dense = differentiate(fused_klq_loss, case, **given)
    for rows_at_once in (1, 7, 32):
        sums, seeds = None, 40
        for seed in range(seeds):
            found = differentiate(
                fused_klq_loss, case, **given, gradient="sampled", samples=16, seed=seed,
                workspace_bytes=workspace_for(rows_at_once, case),
            )  # fmt: skip
            sums = found.gradients if sums is None else {n: sums[n] + g for n, g in found.gradients.items()}
        assert sums is not None
        for name in ("hidden", "weight", "bias"):
            error = (sums[name].double() / seeds - dense.gradients[name].double()).norm() / dense.gradients[name].norm()
            assert error < 2 * 0.25 / math.sqrt(seeds) + 1e-4, (name, rows_at_once)


def test_log_probabilities_and_the_loss_sample_alike(device: torch.device) -> None:
    """The loss with targets is one function of the log-probabilities: the same seed keeps the same entries."""
    case = make_case(ragged_mask(4, 20), vocab=260, device=device)
    given = case.loss_arguments(on_policy=False)
    fused = differentiate(fused_klq_loss, case, **given, **SAMPLED)
    leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    out = linear_logprobs(*leaves[:2], case.actions, bias=leaves[2], mask=case.mask, **SAMPLED)
    targets = case.targets
    error = 0.05 * (out.logprobs - targets.old_logprobs) + case.values - targets.old_values - targets.advantages
    (error.square() * case.valid).sum().div(case.valid.sum()).backward()
    for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True):
        torch.testing.assert_close(leaf.grad, fused.gradients[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias", "none"])
def test_only_what_is_needed_is_made(needed: str, device: torch.device) -> None:
    case = make_case(ragged_mask(4, 20), vocab=260, device=device)
    whole = differentiate(fused_klq_loss, case, **case.loss_arguments(on_policy=True), **SAMPLED)
    leaves = {n: getattr(case, n).detach().clone().requires_grad_(n == needed) for n in ("hidden", "weight", "bias")}
    values = case.values.clone().requires_grad_()
    loss, metrics = fused_klq_loss(
        leaves["hidden"], leaves["weight"], case.actions, values, bias=leaves["bias"],
        **case.loss_arguments(on_policy=True), **SAMPLED,
    )  # fmt: skip
    loss.backward()
    assert (metrics["gradient_entries"] == 0) == (needed == "none")
    for name, leaf in leaves.items():
        if name == needed:
            torch.testing.assert_close(leaf.grad, whole.gradients[name])
        else:
            assert leaf.grad is None


def test_rows_that_want_no_gradient_and_rows_that_have_none(device: torch.device) -> None:
    case = make_case(torch.ones(2, 6, dtype=torch.bool), vocab=80, device=device)
    still = case.loss_arguments(on_policy=False) | {"weights": torch.zeros_like(case.values)}
    found = differentiate(fused_klq_loss, case, **still, **SAMPLED)
    for name in ("hidden", "weight", "bias"):
        assert (found.gradients[name] == 0).all()
    nothing = make_case(torch.zeros(2, 6, dtype=torch.bool), vocab=80, device=device)
    found = differentiate(fused_klq_loss, nothing, **nothing.loss_arguments(on_policy=False), **SAMPLED)
    assert all((gradient == 0).all() for gradient in found.gradients.values())
    assert found.metrics["gradient_entries"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(bad: float, device: torch.device) -> None:
    case = make_case(torch.ones(2, 6, dtype=torch.bool), vocab=80, device=device)
    values = case.values.clone()
    values[0, 3] = bad
    given = case.loss_arguments(on_policy=False)
    weight = case.weight.clone().requires_grad_()
    fused_klq_loss(case.hidden, weight, case.actions, values, **given, **SAMPLED).loss.backward()
    assert weight.grad is not None
    assert weight.grad.isnan().any()


def test_a_gradient_by_the_entropy_is_refused(device: torch.device) -> None:
    case = make_case(torch.ones(2, 6, dtype=torch.bool), vocab=80, device=device)
    hidden = case.hidden.clone().requires_grad_()
    out = linear_logprobs(hidden, case.weight, case.actions, return_entropy=True, **SAMPLED)
    assert out.entropy is not None
    out.logprobs.sum().backward(retain_graph=True)  # one that does not read it is fine
    with pytest.raises(RuntimeError, match="sampled gradient has no part by the entropy"):
        (out.logprobs + out.entropy).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "sparse"}, "gradient: must be one of dense, sampled"),
        ({"samples": 0}, "samples: must be an int in"),
        ({"samples": 1.5}, "samples: must be an int in"),
        ({"samples": True}, "samples: must be an int in"),
        ({"seed": 0.5}, "seed: must be None, an int64 tensor or an int"),
        ({"seed": 2**63}, "seed: must be None, an int64 tensor or an int"),
        ({"seed": torch.tensor([1, 2])}, "seed: must be one int64 number"),
        ({"seed": torch.tensor(1.0)}, "seed: must be one int64 number"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    case = make_case(torch.ones(2, 6, dtype=torch.bool), vocab=80)
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_logprobs(case.hidden, case.weight, case.actions, **{"gradient": "sampled", **options})
    with pytest.raises(ValueError, match=f"^{message}"):
        fused_klq_loss(
            case.hidden, case.weight, case.actions, case.values, targets=case.targets,
            **{"gradient": "sampled", **options},
        )  # fmt: skip


@given(
    n=st.integers(1, 40), vocab=st.integers(1, 300), samples=st.integers(1, 400), seed=st.integers(-(2**63), 2**63 - 1),
    kind=st.sampled_from(KINDS),
)  # fmt: skip
def test_no_row_runs_out_of_room(n: int, vocab: int, samples: int, seed: int, kind: str, device: torch.device) -> None:
    """For any rows, any number of them, any K and seed; a row without room would be NaN or an error."""
    logits, actions = rows(kind, n, vocab, seed % 1000)
    g = torch.randn(n, generator=torch.Generator().manual_seed(seed % 997)).exp()
    found = gradients(
        logits.clamp(min=-1e30), actions, g, device=device, gradient="sampled", samples=samples, seed=seed
    )
    assert found["by_logits"].isfinite().all()
    assert (found["by_logits"] != 0).sum() <= n * (samples + 2)
