"""``linear_logprobs`` and the gradients of all three of its outputs, against float64 and against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    SPREADS,
    Case,
    assert_as_precise_as,
    assert_close_to_scale,
    make_case,
    plain_logprobs,
    ragged_mask,
    workspace_for,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import chunk_rows, masks, seeds, vocabularies
from torch import Tensor
from watch import Watch

from klq_kernels import linear_logprobs, pack, reference

LEAVES = ("hidden", "weight", "bias")


def run(function: Callable[..., Any], case: Case, parts: tuple[int, ...] = (1, 1, 1), **options: Any) -> Any:
    """({output name: tensor}, {leaf name: gradient}) of a random combination of the outputs that ``parts`` selects."""
    leaves = [getattr(case, name).detach().requires_grad_() for name in LEAVES]
    hidden, weight, bias = leaves
    outputs = function(hidden, weight, case.actions, bias=bias, **options)
    upstream = (case.advantages, case.rewards, case.values)
    total = sum(
        (torch.where(case.valid, out, 0) * up).sum()
        for out, up, used in zip(outputs, upstream, parts, strict=True)
        if used
    )
    gradients = torch.autograd.grad(total, leaves)
    names = ("logprobs", "logsumexp", "entropy")
    return dict(zip(names, (o.detach() for o in outputs), strict=True)), dict(zip(LEAVES, gradients, strict=True))


def ours(case: Case, parts: tuple[int, ...] = (1, 1, 1), **options: Any) -> Any:
    return run(linear_logprobs, case, parts, return_entropy=True, **case.layout, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 15.0}], ids=["plain", "capped"])
def test_precision_contract(device: torch.device, dtype: torch.dtype, spread: str, options: dict[str, float]) -> None:
    case = make_case(ragged_mask(5, 24), vocab=1009, width=64, spread=spread, dtype=dtype, device=device)
    outputs, gradients = ours(case, workspace_bytes=workspace_for(13, case), **options)
    plain, plain_gradients = run(plain_logprobs, case, **options)
    gold, gold_gradients = run(reference.linear_logprobs, case.double(), **options)
    keep = case.valid
    for name, out in outputs.items():
        assert out.dtype == torch.float32
        assert out[~keep].eq(0).all()
        assert_as_precise_as(out[keep], plain[name][keep], gold[name][keep.cpu()], name)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_as_precise_as(gradient, plain_gradients[name], gold_gradients[name], f"d {name}")


@pytest.mark.parametrize(
    "parts",
    [(True, False, False), (False, True, False), (False, False, True), (True, False, True), (False, True, True)],
)
def test_each_output_brings_its_own_gradient(device: torch.device, parts: tuple[int, ...]) -> None:
    case = make_case(ragged_mask(4, 9), device=device)
    _, gradients = ours(case, parts, workspace_bytes=workspace_for(4, case), temperature=1.3, softcap=20.0)
    _, gold = run(reference.linear_logprobs, case.double(), parts, temperature=1.3, softcap=20.0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.cpu().double(), gold[name], rtol=1e-4, atol=1e-5)


@given(
    mask=masks(),
    vocab=vocabularies,
    width=st.integers(1, 9),
    seed=seeds,
    rows=chunk_rows,
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    softcap=st.sampled_from([None, 5.0]),
)
@pytest.mark.runs("one process", "log-probabilities")
def test_any_shape_in_all_layouts(
    device: torch.device, mask: Tensor, vocab: int, width: int, seed: int, rows: int | None, **head: Any
) -> None:
    case = make_case(mask, vocab=vocab, width=width, spread="flat", seed=seed, device=device)
    options = {**head, "workspace_bytes": None if rows is None else workspace_for(rows, case)}
    outputs, gradients = ours(case, **options)
    gold, gold_gradients = run(reference.linear_logprobs, case.double(), **head)
    for name, out in outputs.items():
        assert out.shape == mask.shape
        torch.testing.assert_close(out.cpu().double(), torch.where(mask, gold[name], 0), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.cpu().double(), gold_gradients[name], rtol=1e-4, atol=1e-5)
    for packed, kept in ((case.packed(), case.valid), (case.packed(holes=True), torch.ones_like(case.valid))):
        same, same_gradients = ours(packed, **options)
        for name, out in outputs.items():
            assert_close_to_scale(out[kept], same[name], name)
        assert_close_to_scale(gradients["hidden"][kept], same_gradients["hidden"], "d hidden")
        for name in ("weight", "bias"):
            assert_close_to_scale(gradients[name], same_gradients[name], f"d {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_nonsense_changes_nothing(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(ragged_mask(5, 9), dtype=dtype, device=device)
    spoiled = replace(case.spoiled(), advantages=case.advantages, rewards=case.rewards, values=case.values)
    for clean, dirty in zip(ours(case), ours(spoiled), strict=True):
        assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_two_runs_agree_and_every_element_is_written(device: torch.device, poisoned: None) -> None:
    case = make_case(ragged_mask(5, 9), vocab=257, device=device)
    runs = [ours(case, workspace_bytes=workspace_for(5, case)) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        for name, tensor in first.items():
            assert tensor.isfinite().all(), name
            assert torch.equal(tensor, second[name])


def test_packing_gives_the_same_bits(device: torch.device) -> None:
    case = make_case(ragged_mask(5, 9), device=device)
    packed = run(linear_logprobs, case, return_entropy=True, packing=pack(mask=case.mask))
    for direct, other in zip(ours(case), packed, strict=True):
        assert all(torch.equal(direct[name], other[name]) for name in direct)


def test_forbidden_tokens_have_probability_zero(device: torch.device) -> None:
    """A bias of -inf (a banned token) is no trouble: 0 log 0 = 0 in the entropy, and no NaN in any gradient."""
    case = make_case(ragged_mask(4, 9), device=device)
    banned = torch.ones(case.bias.numel(), dtype=torch.bool, device=device)
    banned[case.actions[case.valid]] = False
    assert banned.any()
    case = replace(case, bias=case.bias.masked_fill(banned, -float("inf")))
    outputs, gradients = ours(case)
    allowed = replace(case.double(), weight=case.weight[~banned].cpu().double(), bias=case.bias[~banned].cpu().double())
    number = (~banned).cumsum(0) - 1
    allowed = replace(allowed, actions=torch.where(case.valid, number[case.actions], 0).cpu())
    gold, gold_gradients = run(reference.linear_logprobs, allowed)
    for name, out in outputs.items():
        torch.testing.assert_close(
            out.cpu().double(), torch.where(case.valid.cpu(), gold[name], 0), rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(gradients["hidden"].cpu().double(), gold_gradients["hidden"], rtol=1e-4, atol=1e-5)
    for name in ("weight", "bias"):
        assert gradients[name][banned].eq(0).all()
        torch.testing.assert_close(gradients[name][~banned].cpu().double(), gold_gradients[name], rtol=1e-4, atol=1e-5)


def test_logits_of_any_size_are_finite(device: torch.device) -> None:
    case = make_case(ragged_mask(3, 6), spread="flat", device=device)
    case = replace(case, bias=case.bias * 1e4)
    outputs, gradients = ours(case)
    assert all(t.isfinite().all() for t in (*outputs.values(), *gradients.values()))
    gold, _ = run(reference.linear_logprobs, case.double())
    torch.testing.assert_close(
        outputs["logprobs"][case.valid].cpu().double(), gold["logprobs"][case.valid.cpu()], rtol=1e-6, atol=1e-2
    )


def test_int32_actions(device: torch.device) -> None:
    case = make_case(ragged_mask(3, 6), device=device)
    narrow = replace(case, actions=case.actions.int())
    assert torch.equal(ours(case)[0]["logprobs"], ours(narrow)[0]["logprobs"])


@pytest.mark.parametrize("sampling", [{}, {"gradient": "sampled", "samples": 4, "seed": 1}], ids=["dense", "sampled"])
def test_non_contiguous_inputs(device: torch.device, sampling: dict[str, Any]) -> None:
    case = make_case(ragged_mask(4, 9), device=device).with_exact_logits()
    strided = case.map(lambda t: torch.stack([t, t], -1)[..., 0] if t.dim() != 2 else t.T.contiguous().T)
    assert not any(t.is_contiguous() for t in (strided.hidden, strided.weight, strided.bias, strided.actions))
    parts = (1, 1, 0) if sampling else (1, 1, 1)
    for got, expected in zip(ours(strided, parts, **sampling), ours(case, parts, **sampling), strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)


def test_no_entropy_unless_asked_for(device: torch.device) -> None:
    case = make_case(ragged_mask(3, 6), device=device)
    got = linear_logprobs(case.hidden, case.weight, case.actions, mask=case.mask)
    assert got.entropy is None
    asked = linear_logprobs(case.hidden, case.weight, case.actions, mask=case.mask, return_entropy=True)
    torch.testing.assert_close(got.logprobs, asked.logprobs, rtol=1e-6, atol=1e-6)


def test_entropy_only_backward_with_frozen_weight(device: torch.device) -> None:
    case = make_case(ragged_mask(3, 6), device=device)
    hidden = case.hidden.clone().requires_grad_()
    with Watch() as watch:
        out = linear_logprobs(hidden, case.weight, case.actions, mask=case.mask, return_entropy=True)
        assert out.entropy is not None
        out.entropy.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[case.valid].ne(0).any()
    assert watch.products() == 3  # the logits, twice, and d_hidden: none is for the weight


def test_logits_never_outgrow_the_workspace(device: torch.device) -> None:
    case = make_case(torch.ones(4, 32, dtype=torch.bool), vocab=1009, width=8, device=device)
    workspace = workspace_for(16, case)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    with Watch() as watch:
        out = linear_logprobs(
            hidden, weight, case.actions, bias=case.bias, return_entropy=True, workspace_bytes=workspace
        )
        assert out.entropy is not None
        (out.logprobs.sum() + out.entropy.sum()).backward()
    assert hidden.grad is not None
    assert watch.largest() <= workspace < 128 * 1009 * 4


@pytest.mark.parametrize("temperature", [1e-6, 1e-9, 1e-20])
def test_entropy_of_a_cold_softmax(device: torch.device, temperature: float) -> None:
    """All of the probability lies on one token, and what other columns and lanes add is 0, not 0 * inf."""
    case = make_case(ragged_mask(2, 3), vocab=700, device=device)
    options = {"temperature": temperature, "return_entropy": True}
    entropy = linear_logprobs(case.hidden, case.weight, case.actions, **options).entropy
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.zeros_like(entropy))
