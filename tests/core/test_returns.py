"""``reverse_scan``, ``gae``, ``lambda_returns`` and ``klq_targets`` against the oracle, in every layout and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, Case, make_case, ragged_mask, same_in_all_layouts
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks, seeds
from torch import Tensor

from klq_kernels import gae, klq_targets, lambda_returns, pack, reference, reverse_scan

discounts = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def close(ours: Tensor, gold: Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.cpu().double(), gold, rtol=1e-5, atol=2e-6)


def scan_case(mask: Tensor, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    case = make_case(mask, vocab=3, width=2, device=device, seed=seed)
    return case.map(lambda t: t.to(dtype) if t.is_floating_point() else t)


def target_arguments(case: Case, *, scores: bool, bootstrap: bool, trace: bool) -> dict[str, Any]:
    return {
        "rewards": case.scores if scores else case.rewards,
        "bootstrap_values": case.bootstrap_values if bootstrap else None,
        "trace": case.trace if trace else None,
        **case.layout,
    }


def targets_of(function: Callable[..., Any], case: Case, *, tau: float = 0.05, **options: Any) -> Any:
    chosen = {name: options.pop(name, False) for name in ("scores", "bootstrap", "trace")}
    arguments = target_arguments(case, **chosen)
    return function(case.old_logprobs, case.ref_logprobs, case.old_values, tau=tau, **arguments, **options)


@given(mask=masks(), seed=seeds, gamma=discounts, lam=discounts, flags=st.tuples(*[st.booleans()] * 3))
@pytest.mark.runs("one process", "scans, targets")
def test_klq_targets_match_the_oracle_in_all_layouts(
    device: torch.device, mask: Tensor, seed: int, gamma: float, lam: float, flags: tuple[bool, bool, bool]
) -> None:
    case = scan_case(mask, device, seed)
    options = dict(zip(("scores", "bootstrap", "trace"), flags, strict=True), gamma=gamma, lam=lam, tau=0.3)
    ours = targets_of(klq_targets, case, **options)
    gold = targets_of(reference.klq_targets, case.double(), **options)
    for mine, theirs in zip(ours, gold, strict=True):
        close(mine, theirs)
        assert mine.shape == mask.shape
        assert mine[~case.valid].eq(0).all()
    for packed, kept in ((case.packed(), case.valid), (case.packed(holes=True), torch.ones_like(case.valid))):
        if flags[0] and packed.actions.numel() == len(mask):
            continue  # as many tokens as sequences: scores would read as rewards per token
        same = targets_of(klq_targets, packed, **options)
        for mine, other in zip(ours, same, strict=True):
            same_in_all_layouts(mine[kept], other)


@given(mask=masks(), seed=seeds, gamma=discounts, lam=discounts, scores=st.booleans(), bootstrap=st.booleans())
def test_gae_and_lambda_returns_match_the_oracle(
    device: torch.device, mask: Tensor, seed: int, gamma: float, lam: float, scores: bool, bootstrap: bool
) -> None:
    case = scan_case(mask, device, seed)
    for ours, gold in ((gae, reference.gae), (lambda_returns, reference.lambda_returns)):

        def call(function: Callable[..., Tensor], case: Case) -> Tensor:
            arguments = target_arguments(case, scores=scores, bootstrap=bootstrap, trace=False)
            arguments.pop("trace")
            return function(values=case.values, gamma=gamma, lam=lam, **arguments)

        close(call(ours, case), call(gold, case.double()))
        packed = case.packed(holes=True)
        if not (scores and packed.actions.numel() == len(mask)):
            same_in_all_layouts(call(ours, case).flatten(), call(ours, packed))


@given(mask=masks(), seed=seeds, decay=st.sampled_from(["number", "0-d", "per token"]))
def test_reverse_scan_and_its_gradients_match_the_oracle(
    device: torch.device, mask: Tensor, seed: int, decay: str
) -> None:
    case = scan_case(mask, device, seed)
    upstream = case.advantages
    choices: dict[str, Tensor | float] = {"number": -0.9, "0-d": torch.tensor(0.9, device=device)}
    decays = choices.get(decay, 1.5 * case.trace - 0.5)

    def run(function: Callable[..., Tensor], case: Case, delta: Tensor, decays: Tensor | float, up: Tensor) -> Any:
        leaves = [t.detach().clone().requires_grad_() for t in (delta, decays) if isinstance(t, Tensor)]
        out = function(leaves[0], leaves[1] if len(leaves) > 1 else decays, **case.layout)
        # masked outputs are constants 0; some callers still send them a gradient
        return out.detach(), torch.autograd.grad((out * up).sum(), leaves) if out.requires_grad else ()

    out, gradients = run(reverse_scan, case, case.rewards, decays, upstream)
    double = decays.cpu().double() if isinstance(decays, Tensor) else decays
    gold = case.double()
    gold_out, gold_gradients = run(reference.reverse_scan, gold, gold.rewards, double, gold.advantages)
    close(out, gold_out)
    if gold_gradients:
        for ours, theirs in zip(gradients, gold_gradients, strict=True):
            torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-5)
    for other in (case.packed(), case.packed(holes=True)):
        per_token = decays
        if isinstance(decays, Tensor) and decays.dim():
            per_token = decays[case.valid] if other.mask is None else decays.flatten()
        packed, packed_gradients = run(reverse_scan, other, other.rewards, per_token, other.advantages)
        pick = case.valid if other.mask is None else torch.ones_like(case.valid)
        same_in_all_layouts(out[pick], packed)
        for ours, theirs in zip(gradients, packed_gradients, strict=True):
            if ours.dim():
                same_in_all_layouts(ours[pick], theirs)
            else:  # a sum over different layouts
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bit_inputs_are_carried_in_fp32(device: torch.device, dtype: torch.dtype) -> None:
    """Only the inputs are rounded: against gold on the rounded inputs the error is fp32's."""
    case = scan_case(ragged_mask(4, 40), device, dtype=dtype)
    close(reverse_scan(case.rewards, case.trace, mask=case.mask), _gold_scan(case))
    ours = targets_of(klq_targets, case, bootstrap=True, trace=True)
    gold = targets_of(reference.klq_targets, case.double(), bootstrap=True, trace=True)
    for mine, theirs in zip(ours, gold, strict=True):
        close(mine, theirs)


def _gold_scan(case: Case) -> Tensor:
    double = case.double()
    return reference.reverse_scan(double.rewards, double.trace, mask=double.mask)


@pytest.mark.parametrize("decay", [0.0, 0.95, 0.9999, 1.0])
def test_long_sequences_stay_accurate(device: torch.device, decay: float) -> None:
    """No cumulative products, which leave the finite numbers by T = 4096; also across every tile of a kernel."""
    delta = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    ours = reverse_scan(delta.to(device), decay).cpu().double()
    gold = torch.zeros(3, 5001, dtype=torch.float64)
    decay = float(torch.tensor(decay))  # as rounded to fp32
    for t in reversed(range(5000)):
        gold[:, t] = delta[:, t].double() + decay * gold[:, t + 1]
    assert (ours - gold[:, :-1]).abs().max() <= 1e-5 * gold.abs().max()


def test_many_sequence_lengths_in_one_pack(device: torch.device) -> None:
    """Ends at every offset from a power of two: before, on and after whatever block or tile a backend uses."""
    lengths = [length for k in range(0, 12) for length in (2**k - 1, 2**k, 2**k + 1)]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    delta = torch.randn(int(ends[-1]), generator=torch.Generator().manual_seed(1))
    decay = torch.rand(delta.shape, generator=torch.Generator().manual_seed(2))
    whole = reverse_scan(delta.to(device), decay.to(device), cu_seqlens=ends.to(device)).cpu()
    gold = reference.reverse_scan(delta.double(), decay.double(), cu_seqlens=ends)
    close(whole, gold)


def test_masked_nonsense_changes_nothing(device: torch.device) -> None:
    case = scan_case(ragged_mask(5, 9), device)
    spoiled = case.spoiled()
    for options in ({}, {"trace": True, "bootstrap": True}, {"scores": True}):
        clean, dirty = (targets_of(klq_targets, c, **options) for c in (case, spoiled))
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert torch.equal(*(reverse_scan(c.rewards, c.trace, mask=c.mask) for c in (case, spoiled)))
    assert torch.equal(*(gae(c.rewards, c.values, mask=c.mask) for c in (case, spoiled)))
    assert torch.equal(*(lambda_returns(c.rewards, c.values, mask=c.mask) for c in (case, spoiled)))


def test_masked_nonsense_changes_no_gradient(device: torch.device) -> None:
    case = scan_case(ragged_mask(5, 9), device)
    gradients = []
    for c in (case, case.spoiled()):
        delta, decay = c.rewards.clone().requires_grad_(), c.trace.clone().requires_grad_()
        reverse_scan(delta, decay, mask=c.mask).square().sum().backward()
        gradients.append((delta.grad, decay.grad))
    for clean, dirty in zip(*gradients, strict=True):
        assert clean is not None
        assert dirty is not None
        assert torch.equal(clean, dirty)
        assert dirty[~case.valid].eq(0).all()


def test_nan_stays_in_its_sequence(device: torch.device) -> None:
    """Boundaries select; they do not multiply by 0."""
    lengths, broken = [3, 4, 1, 5], 1
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    case = scan_case(torch.ones(1, sum(lengths), dtype=torch.bool), device).packed()
    inside = torch.zeros(sum(lengths), dtype=torch.bool, device=device)
    inside[ends[broken] : ends[broken + 1]] = True
    ends = ends.to(device)
    for bad in (float("nan"), float("inf")):
        rewards = torch.where(inside, bad, case.rewards)
        for decay in (case.trace, 0.9):
            clean = reverse_scan(case.rewards, decay, cu_seqlens=ends)
            assert torch.equal(reverse_scan(rewards, decay, cu_seqlens=ends)[~inside], clean[~inside])
        arguments = (case.old_logprobs, case.ref_logprobs, case.old_values)
        clean = klq_targets(*arguments, case.rewards, cu_seqlens=ends).advantages
        dirty = klq_targets(*arguments, rewards, cu_seqlens=ends).advantages
        assert torch.equal(dirty[~inside], clean[~inside])
        assert not dirty[inside].isfinite().any()


def test_packing_gives_the_same_bits(device: torch.device) -> None:
    case = scan_case(ragged_mask(5, 9), device)
    packing = pack(mask=case.mask)
    direct = targets_of(klq_targets, case, trace=True)
    arguments = (case.old_logprobs, case.ref_logprobs, case.old_values, case.rewards)
    packed = klq_targets(*arguments, tau=0.05, trace=case.trace, packing=packing)
    assert all(torch.equal(a, b) for a, b in zip(direct, packed, strict=True))
    assert torch.equal(gae(case.rewards, case.values, mask=case.mask), gae(case.rewards, case.values, packing=packing))
    assert torch.equal(
        reverse_scan(case.rewards, case.trace, mask=case.mask), reverse_scan(case.rewards, case.trace, packing=packing)
    )


def test_two_runs_agree_and_every_element_is_written(device: torch.device, poisoned: None) -> None:
    case = scan_case(ragged_mask(7, 33), device)
    runs = [targets_of(klq_targets, case, trace=True, bootstrap=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(t.isfinite().all() for t in runs[0])
    scans = [reverse_scan(case.rewards, case.trace, mask=case.mask) for _ in range(2)]
    assert torch.equal(*scans)
    close(scans[0], _gold_scan(case))


def test_non_contiguous_inputs(device: torch.device) -> None:
    case = scan_case(ragged_mask(6, 10), device)
    strided = case.map(lambda t: t.T.contiguous().T if t.dim() == 2 else t)
    assert not strided.rewards.is_contiguous()
    for a, b in zip(
        targets_of(klq_targets, case, trace=True), targets_of(klq_targets, strided, trace=True), strict=True
    ):
        assert torch.equal(a, b)
    assert torch.equal(
        reverse_scan(case.rewards, case.trace, mask=case.mask),
        reverse_scan(strided.rewards, strided.trace, mask=strided.mask),
    )
    wide = torch.stack([case.rewards, case.trace], -1)
    sliced = reverse_scan(wide[..., 0], wide[..., 1], mask=case.mask)
    assert torch.equal(sliced, reverse_scan(case.rewards, case.trace, mask=case.mask))
    expanded = torch.ones((), device=device).expand(6, 10)
    assert torch.equal(reverse_scan(expanded, 0.5), reverse_scan(expanded.contiguous(), 0.5))


def test_a_column_of_a_wider_mask(device: torch.device) -> None:
    """Views that flatten without a copy: strided where T = 1 or packed, of stride 0 where one flag is expanded."""
    wide = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.bool, device=device)
    values = torch.randn(4, 1, generator=torch.Generator().manual_seed(0)).to(device)
    ends = torch.tensor([0, 2, 4], dtype=torch.int32, device=device)
    for mask in (wide[:, :1], wide[:1, :1].expand(4, 1)):
        plain = mask.contiguous()
        assert torch.equal(gae(values, values, mask=mask), gae(values, values, mask=plain))
        assert torch.equal(gae(values, values, packing=pack(mask)), gae(values, values, packing=pack(plain)))
        flat, packed = values[:, 0], {"cu_seqlens": ends}
        assert torch.equal(
            gae(flat, flat, mask=mask[:, 0], **packed), gae(flat, flat, mask=plain[:, 0].contiguous(), **packed)
        )


def test_second_derivatives_of_the_scan(device: torch.device) -> None:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3] = False
    case = scan_case(mask, device)

    def second(function: Callable[..., Tensor], case: Case) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (case.rewards, case.trace)]
        first = torch.autograd.grad(function(*leaves, mask=case.mask).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for ours, gold in zip(second(reverse_scan, case), second(reference.reverse_scan, case.double()), strict=True):
        torch.testing.assert_close(ours.cpu().double(), gold, rtol=1e-4, atol=1e-4)


def test_a_decay_whose_powers_overflow(device: torch.device) -> None:
    """Nothing lies beyond the last token, so what a decay comes to over a whole block must not meet it."""
    got = reverse_scan(torch.ones(2, 12, device=device), 300.0)
    wanted = torch.full((2,), (300.0**12 - 1) / 299, dtype=torch.float64)
    torch.testing.assert_close(got[:, 0].cpu().double(), wanted, rtol=1e-5, atol=0)


def test_targets_carry_no_gradient_and_share_no_memory(device: torch.device) -> None:
    case = scan_case(torch.ones(2, 4, dtype=torch.bool), device)
    logprobs, values = case.old_logprobs.clone().requires_grad_(), case.old_values.clone().requires_grad_()
    targets = klq_targets(logprobs, case.ref_logprobs, values, case.rewards)
    assert not any(t.requires_grad for t in targets)
    before = [t.clone() for t in targets]
    with torch.no_grad():  # the optimiser's next step must not move the targets
        logprobs.add_(1)
        values.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(targets, before, strict=True))
