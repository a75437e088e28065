"""``fused_klq_loss`` in both modes, and ``klq_loss``: losses, gradients, metrics against float64 and plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    LOSS_TYPES,
    SPREADS,
    Case,
    Outcome,
    assert_as_precise_as,
    assert_same_bits,
    assert_same_in_layouts,
    differentiate,
    make_case,
    plain_klq_loss,
    ragged_mask,
    rms,
    workspace_for,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import chunk_rows, masks, seeds, vocabularies
from torch import Tensor
from watch import Watch

from klq_kernels import KLQLoss, KLQTargets, fused_klq_loss, klq_loss, klq_targets, linear_logprobs, pack, reference
from klq_kernels.commands import loss_memory

MODES = [pytest.param(True, id="on-policy"), pytest.param(False, id="targets")]
ON_POLICY = {"gamma": 0.97, "lam": 0.9}


def fused(case: Case, *, on_policy: bool, bias: bool = True, rows: int | None = None, **options: Any) -> Outcome:
    """The fused loss and its gradients; ``rows`` is the most that one chunk may hold."""
    if rows is not None:
        options["workspace_bytes"] = workspace_for(rows, case)
    return differentiate(fused_klq_loss, case, bias=bias, **arguments(case, on_policy, options), **options)


def gold_of(case: Case, *, on_policy: bool, bias: bool = True, **options: Any) -> Outcome:
    case = case.double()
    return differentiate(reference.naive_klq_loss, case, bias=bias, **arguments(case, on_policy, options), **options)


def arguments(case: Case, on_policy: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Pops the switches of ``Case.loss_arguments`` from ``options`` and turns them into tensors."""
    switches = {name: options.pop(name, False) for name in ("scores", "bootstrap", "trace", "weights")}
    return case.loss_arguments(on_policy=on_policy, **switches)


def assert_close(ours: Outcome, gold: Outcome) -> None:
    torch.testing.assert_close(ours.loss.cpu().double(), gold.loss, rtol=1e-5, atol=1e-6)
    assert ours.gradients.keys() == gold.gradients.keys()
    for name, gradient in ours.gradients.items():
        torch.testing.assert_close(
            gradient.cpu().double(), gold.gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"d {n}: {m}"
        )


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("on_policy", MODES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("rows", [None, 13], ids=["whole", "chunked"])
def test_precision_contract(
    device: torch.device, on_policy: bool, loss_type: str, dtype: torch.dtype, spread: str, rows: int | None
) -> None:
    case = make_case(ragged_mask(5, 24), vocab=1009, width=64, spread=spread, dtype=dtype, device=device)
    options: dict[str, Any] = {"loss_type": loss_type, "alpha": 0.8, "tau": 0.3, "value_clip": 0.5, "weights": True}
    if on_policy:
        options |= {**ON_POLICY, "bootstrap": True, "trace": True, "scores": True}
    ours = fused(case, on_policy=on_policy, rows=rows, **options)
    gold = gold_of(case, on_policy=on_policy, **options)
    plain = differentiate(plain_klq_loss, case, **arguments(case, on_policy, options), **options)
    assert ours.loss.dtype == torch.float32
    assert_as_precise_as(ours.loss, plain.loss, gold.loss, "loss")
    for name, gradient in ours.gradients.items():
        assert gradient.dtype == getattr(case, name).dtype
        assert rms(gradient) > 0
        # a CPU's 16-bit product is rounded to 16 bits, so over several chunks d_weight is rounded twice, not once
        twice = name == "weight" and device.type == "cpu" and rows is not None and dtype != torch.float32
        factor = 2.0 if twice else 1.5
        assert_as_precise_as(gradient, plain.gradients[name], gold.gradients[name], f"d {name}", factor=factor)


@pytest.mark.parametrize("head", [{}, {"temperature": 0.75}, {"softcap": 1000.0}], ids=["plain", "warm", "capped"])
def test_the_gradient_of_a_likely_token_survives_large_logits(device: torch.device, head: dict[str, float]) -> None:
    """It is 1 - p = 0.0025 here, from logits of 200; a logsumexp rounded to fp32 has lost thousandths of it."""
    weight = torch.tensor([[200.0], [194.0]], device=device)
    hidden = torch.linspace(1.0, 1.125, 9, device=device)[None, :, None]  # multiples of 1/64: the logits are exact
    actions, ones = torch.zeros(1, 9, dtype=torch.int64, device=device), torch.ones(1, 9, device=device)

    def scored(weight: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, actions, **head).logprobs.sum()

    def learned(weight: Tensor) -> Tensor:
        targets = KLQTargets(0 * ones, 0 * ones, 100 * ones)
        return fused_klq_loss(hidden, weight, actions, 0 * ones, targets=targets, tau=1.0, **head).loss

    exact = weight.double().requires_grad_()
    logp = reference.linear_logprobs(hidden.double(), exact, actions, **head).logprobs
    for function, gold in ((scored, logp.sum()), (learned, (logp - 100).square().mean())):
        leaf = weight.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(leaf), leaf)
        (right,) = torch.autograd.grad(gold, exact, retain_graph=True)
        # one unit in the last place of p = 0.9997 is 2e-4 of 1 - p
        torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=0)


@given(
    mask=masks(),
    vocab=vocabularies,
    width=st.integers(1, 9),
    seed=seeds,
    rows=chunk_rows,
    on_policy=st.booleans(),
    switches=st.fixed_dictionaries({n: st.booleans() for n in ("scores", "bootstrap", "trace", "weights", "bias")}),
    options=st.fixed_dictionaries(
        {
            "loss_type": st.sampled_from(LOSS_TYPES),
            "alpha": st.sampled_from([0.3, 1.0]),
            "tau": st.sampled_from([0.05, 1.0]),
            "temperature": st.sampled_from([1.0, 0.5, 3.0]),
            "softcap": st.sampled_from([None, 5.0]),
            "denom": st.sampled_from([None, 3.0, 4096, "tensor"]),
        }
    ),
    scan=st.fixed_dictionaries({"gamma": st.sampled_from([0.0, 0.9, 1.0]), "lam": st.sampled_from([0.0, 0.95, 1.0])}),
)
@pytest.mark.runs("one process", "loss")
def test_any_shape_in_all_layouts(
    device: torch.device,
    mask: Tensor,
    vocab: int,
    width: int,
    seed: int,
    rows: int | None,
    on_policy: bool,
    switches: dict[str, bool],
    options: dict[str, Any],
    scan: dict[str, float],
) -> None:
    case = make_case(mask, vocab=vocab, width=width, spread="flat", seed=seed, device=device)
    options = {**options, **switches, **(scan if on_policy else {})}
    if options["denom"] == "tensor":
        options["denom"] = torch.tensor(7, device=device)
    ours = fused(case, on_policy=on_policy, rows=rows, **options)
    # the double copy of denom is the same number
    assert_close(ours, gold_of(case, on_policy=on_policy, **options))
    assert all(not m.requires_grad and m.dim() == 0 and m.isfinite() for m in ours.metrics.values())
    for packed, kept in ((case.packed(), case.valid), (case.packed(holes=True), torch.ones_like(case.valid))):
        if on_policy and switches["scores"] and packed.actions.numel() == len(mask):
            continue  # as many tokens as sequences: scores would read as rewards per token
        assert_same_in_layouts(ours, fused(packed, on_policy=on_policy, rows=rows, **options), kept)


@pytest.mark.parametrize("on_policy", MODES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 1000])
def test_chunk_boundaries_inside_sequences(device: torch.device, on_policy: bool, rows: int) -> None:
    case = make_case(ragged_mask(4, 13, seed=3), device=device)
    switches = {"trace": True, "bootstrap": True, **ON_POLICY} if on_policy else {}
    ours = fused(case, on_policy=on_policy, rows=rows, **switches)
    assert_close(ours, gold_of(case, on_policy=on_policy, **switches))
    whole = fused(case, on_policy=on_policy, **switches)
    for name, metric in ours.metrics.items():
        torch.testing.assert_close(metric, whole.metrics[name], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- what it must equal


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_equals_logprobs_then_targets_then_loss(device: torch.device, dtype: torch.dtype) -> None:
    """The three unfused functions, composed, are the same computation."""
    case = make_case(ragged_mask(4, 13), dtype=dtype, device=device)
    ours = fused(case, on_policy=True)

    def unfused(hidden: Tensor, weight: Tensor, actions: Tensor, values: Tensor, *, bias: Tensor, **layout: Any) -> Any:
        logprobs = linear_logprobs(hidden, weight, actions, bias=bias, **layout).logprobs
        targets = klq_targets(logprobs, case.ref_logprobs, values, case.rewards, **layout)
        return klq_loss(logprobs, values, targets, **layout)

    other = differentiate(unfused, case, **case.layout)
    torch.testing.assert_close(ours.loss, other.loss, rtol=1e-6, atol=0)
    gold = gold_of(case, on_policy=True)
    for name, gradient in ours.gradients.items():
        error, allowed = (rms(g.cpu().double() - gold.gradients[name]) for g in (gradient, other.gradients[name]))
        assert error <= 1.5 * allowed + 1e-6 * rms(gold.gradients[name]), name


@given(
    mask=masks(),
    seed=seeds,
    loss_type=st.sampled_from(LOSS_TYPES),
    alpha=st.sampled_from([0.3, 1.0]),
    weighted=st.booleans(),
    denom=st.sampled_from([None, 3.0, "tensor"]),
)
def test_klq_loss_matches_the_oracle(
    device: torch.device, mask: Tensor, seed: int, loss_type: str, alpha: float, weighted: bool, denom: Any
) -> None:
    case = make_case(mask, vocab=3, width=2, seed=seed, device=device)
    options: dict[str, Any] = {"loss_type": loss_type, "alpha": alpha, "tau": 0.4}
    options["denom"] = torch.tensor(5.0, device=device) if denom == "tensor" else denom

    def run(function: Any, case: Case) -> Outcome:
        logprobs, values = (t.detach().clone().requires_grad_() for t in (case.ref_logprobs, case.values))
        layout = case.layout if function is klq_loss else {"mask": case.mask}
        weights = {"weights": case.weights} if weighted else {}
        given = options | ({"denom": options["denom"].to(values.device)} if denom == "tensor" else {})
        loss, metrics = function(logprobs, values, case.targets, **layout, **weights, **given)
        loss.backward()
        return Outcome(loss.detach(), metrics, {"hidden": logprobs.grad, "values": values.grad})

    ours = run(klq_loss, case)
    assert_close(ours, run(reference.klq_loss, case.double()))
    assert_same_in_layouts(ours, run(klq_loss, case.packed()), case.valid)
    packing = pack(mask=mask.to(device))
    direct = klq_loss(case.ref_logprobs, case.values, case.targets, packing=packing, **options)
    again = klq_loss(case.ref_logprobs, case.values, case.targets, mask=case.mask, **options)
    assert torch.equal(direct.loss, again.loss)


@pytest.mark.parametrize("on_policy", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_gives_the_same_bits(device: torch.device, on_policy: bool, dtype: torch.dtype) -> None:
    case = make_case(ragged_mask(5, 13), dtype=dtype, device=device)
    direct = fused(case, on_policy=on_policy, rows=6)
    packing = pack(mask=case.mask)
    inside = case.loss_arguments(on_policy=on_policy)
    del inside["mask"], inside["cu_seqlens"]
    same = differentiate(fused_klq_loss, case, packing=packing, workspace_bytes=workspace_for(6, case), **inside)
    assert_same_bits(direct, same)
    assert_same_in_layouts(direct, fused(case.packed(), on_policy=on_policy, rows=6), case.valid)


@pytest.mark.parametrize("on_policy", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_nonsense_changes_nothing(device: torch.device, on_policy: bool, dtype: torch.dtype) -> None:
    case = make_case(ragged_mask(5, 13), dtype=dtype, device=device)
    switches = {"weights": True, "trace": on_policy}
    clean, dirty = (
        fused(c, on_policy=on_policy, rows=6, return_entropy=True, **switches) for c in (case, case.spoiled())
    )
    assert_same_bits(clean, dirty)
    assert clean.gradients["hidden"][~case.valid].eq(0).all()
    assert clean.gradients["values"][~case.valid].eq(0).all()


def test_masked_nonsense_changes_nothing_in_klq_loss(device: torch.device) -> None:
    case = make_case(ragged_mask(5, 13), device=device)
    losses = []
    for c in (case, case.spoiled()):
        logprobs, values = c.ref_logprobs.clone().requires_grad_(), c.values.clone().requires_grad_()
        loss = klq_loss(logprobs, values, c.targets, weights=c.weights, mask=c.mask).loss
        losses.append((loss, *torch.autograd.grad(loss, (logprobs, values))))
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


@pytest.mark.parametrize("on_policy", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_agree(device: torch.device, on_policy: bool, dtype: torch.dtype) -> None:
    case = make_case(ragged_mask(5, 13), vocab=1009, width=64, dtype=dtype, device=device)
    assert_same_bits(*(fused(case, on_policy=on_policy, rows=7, return_entropy=True) for _ in range(2)))


@pytest.mark.parametrize("on_policy", MODES)
def test_every_element_is_written(device: torch.device, on_policy: bool, poisoned: None) -> None:
    case = make_case(ragged_mask(5, 13), vocab=257, device=device)
    got = fused(case, on_policy=on_policy, rows=4, return_entropy=True)
    assert all(t.isfinite().all() for t in got.tensors().values())
    assert_close(got, gold_of(case, on_policy=on_policy))


@pytest.mark.parametrize("rows", [2, None])
def test_nan_stays_in_its_sequence(device: torch.device, rows: int | None) -> None:
    """A broken reward spoils its own sequence's gradients and no other's, also across chunk boundaries."""
    case = make_case(torch.ones(4, 5, dtype=torch.bool), device=device)
    rewards = case.rewards.clone()
    rewards[2, 3] = float("nan")
    clean = fused(case, on_policy=True, rows=rows)
    dirty = fused(replace(case, rewards=rewards), on_policy=True, rows=rows)
    others = torch.tensor([0, 1, 3])
    for name in ("hidden", "values"):
        assert torch.equal(clean.gradients[name][others], dirty.gradients[name][others])
        assert dirty.gradients[name][2, :4].isnan().all()
        assert torch.equal(clean.gradients[name][2, 4], dirty.gradients[name][2, 4])


def test_forbidden_tokens(device: torch.device) -> None:
    """A bias of -inf on tokens never taken: finite loss, entropy and gradients, none of it for those tokens."""
    case = make_case(ragged_mask(4, 9), device=device)
    banned = torch.ones(case.bias.numel(), dtype=torch.bool, device=device)
    banned[case.actions[case.valid]] = False
    got = fused(
        replace(case, bias=case.bias.masked_fill(banned, -float("inf"))), on_policy=True, rows=4, return_entropy=True
    )
    assert all(t.isfinite().all() for t in got.tensors().values())
    assert got.gradients["bias"][banned].eq(0).all()
    assert got.gradients["weight"][banned].eq(0).all()
    assert got.gradients["weight"][~banned].ne(0).any()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 5)])
@pytest.mark.parametrize("on_policy", MODES)
def test_no_valid_token_is_no_error(device: torch.device, shape: tuple[int, int], on_policy: bool) -> None:
    """A data-parallel rank whose share is empty goes on with a loss of 0 and zero gradients."""
    case = make_case(torch.zeros(shape, dtype=torch.bool), device=device)
    for layout in (case, case.packed(), case.packed(holes=True)):
        for denom in (None, 10.0, torch.tensor(10, device=device)):
            got = fused(layout, on_policy=on_policy, denom=denom, return_entropy=True, scores=on_policy)
            assert got.loss == 0
            assert got.gradients.keys() == {"hidden", "weight", "bias", "values"}
            assert all(g.eq(0).all() for g in got.gradients.values())
            assert all(m.eq(0) for m in got.metrics.values())


# ------------------------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize("on_policy", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_retained_graph_gives_the_gradient_again(device: torch.device, on_policy: bool, dtype: torch.dtype) -> None:
    """The gradients are made in the forward and may be scaled in place: a second backward must find them whole."""
    case = make_case(ragged_mask(4, 9), dtype=dtype, device=device)
    once = fused(case, on_policy=on_policy)
    leaves = [getattr(case, n).clone().requires_grad_() for n in ("hidden", "weight", "bias", "values")]
    hidden, weight, bias, values = leaves
    loss = fused_klq_loss(
        hidden, weight, case.actions, values, bias=bias, **case.loss_arguments(on_policy=on_policy)
    ).loss
    for kept in (True, True, False):
        for leaf, name in zip(leaves, once.gradients, strict=True):
            got = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
            assert torch.equal(got, once.gradients[name])
        gradients = torch.autograd.grad(loss, leaves, retain_graph=kept)
        for got, name in zip(gradients, once.gradients, strict=True):
            assert torch.equal(got, once.gradients[name])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_twice_doubles_the_gradient(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(ragged_mask(4, 9), dtype=dtype, device=device)
    once = fused(case, on_policy=True)
    leaves = {n: getattr(case, n).clone().requires_grad_() for n in once.gradients}
    loss = fused_klq_loss(
        leaves["hidden"], leaves["weight"], case.actions, leaves["values"], bias=leaves["bias"],
        **case.loss_arguments(on_policy=True),
    ).loss  # fmt: skip
    loss.backward(retain_graph=True)
    loss.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, 2 * once.gradients[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.3, -4.0, 0.0])
def test_scaled_loss_scales_gradients(device: torch.device, dtype: torch.dtype, factor: float) -> None:
    case = make_case(ragged_mask(4, 9), dtype=dtype, device=device)
    once = fused(case, on_policy=True)

    def scaled(*args: Any, **kwargs: Any) -> KLQLoss:
        loss, metrics = fused_klq_loss(*args, **kwargs)
        return KLQLoss(factor * loss, metrics)

    got = differentiate(scaled, case, **case.loss_arguments(on_policy=True))
    for name, gradient in got.gradients.items():
        eps, tiny = torch.finfo(gradient.dtype).eps, torch.finfo(gradient.dtype).smallest_normal
        expected = factor * once.gradients[name].double()
        assert ((gradient.double() - expected).abs() <= eps * expected.abs() + tiny).all(), name


@pytest.mark.parametrize("denom", [1, 60000, 10**9])
def test_fp16_gradients_of_long_means_do_not_underflow(device: torch.device, denom: int) -> None:
    """A mean over a global batch makes tiny numbers: fp16 d_logits of size g / denom would vanish on their way."""
    case = make_case(ragged_mask(4, 9), dtype=torch.float16, device=device)
    case = replace(case, weight=case.weight.float(), bias=case.bias.float())  # fp32 masters can hold the result
    got = fused(case, on_policy=True, denom=denom)
    gold = gold_of(case, on_policy=True, denom=denom)
    for name in ("weight", "bias", "values"):
        error = rms(got.gradients[name].cpu().double() - gold.gradients[name])
        assert error <= 0.01 * rms(gold.gradients[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_master_weight_with_16_bit_hidden(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(ragged_mask(4, 9), dtype=dtype, device=device)
    master = replace(case, weight=case.weight.float(), bias=case.bias.float())
    same, got = fused(case, on_policy=True), fused(master, on_policy=True)
    assert torch.equal(got.loss, same.loss)
    assert torch.equal(got.gradients["hidden"], same.gradients["hidden"])
    for name in ("weight", "bias"):
        assert got.gradients[name].dtype == torch.float32
        # A result among the smallest fp16 numbers may have been rounded twice: as it was summed, and as it was scaled.
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(got.gradients[name].to(dtype), same.gradients[name], rtol=0, atol=step)


@pytest.mark.parametrize("on_policy", MODES)
def test_autocast(device: torch.device, on_policy: bool) -> None:
    """Like ``F.linear`` the products run in autocast's dtype; the gradients arrive in the parameters'."""
    case = make_case(ragged_mask(4, 9), dtype=torch.bfloat16, device=device).map(
        lambda t: t.float() if t.is_floating_point() else t
    )
    rounded = replace(case, hidden=case.hidden.bfloat16())
    direct = fused(rounded, on_policy=on_policy)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = fused(case, on_policy=on_policy)
        logprobs = linear_logprobs(case.hidden, case.weight, case.actions, mask=case.mask)
    assert torch.equal(got.loss, direct.loss)
    assert got.loss.dtype == torch.float32
    assert logprobs.logprobs.dtype == torch.float32
    for name, gradient in got.gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, direct.gradients[name].float())


def test_columns_of_wider_tensors(device: torch.device) -> None:
    """With T = 1, or packed, a column flattens to a strided view; the kernels want adjacent elements."""
    case = make_case(torch.ones(6, 3, dtype=torch.bool), device=device)
    column = case.map(lambda t: t[:, :1] if t.dim() >= 2 and t.shape[:2] == (6, 3) else t)
    assert not column.actions.is_contiguous()
    plain = column.map(lambda t: t.contiguous())
    for on_policy in (False, True):
        assert_same_bits(fused(column, on_policy=on_policy), fused(plain, on_policy=on_policy))
    zero, numbers = torch.zeros_like(column.values), torch.randn(6, 2, device=device)
    losses = [
        fused_klq_loss(column.hidden, column.weight, column.actions, column.values, ref_logprobs=zero, rewards=scores,
                       bootstrap_values=further).loss
        for scores, further in (numbers.unbind(1), numbers.T.contiguous())
    ]  # fmt: skip
    assert torch.equal(*losses)
    ends = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    strided, plain_actions = case.actions[:, 0], case.actions[:, 0].contiguous()
    got, wanted = (
        linear_logprobs(case.hidden[:, 0], case.weight, a, cu_seqlens=ends) for a in (strided, plain_actions)
    )
    assert torch.equal(got.logprobs, wanted.logprobs)


def test_a_sum_over_tokens_that_fp16_cannot_hold(device: torch.device) -> None:
    """The gradient is a mean, and finite; its sum over 2048 tokens, which is what the products form, is not."""
    hidden = torch.full((1, 2048, 64), 25.0, dtype=torch.float16, device=device).requires_grad_()
    weight = torch.zeros(16, 64, dtype=torch.float16, device=device).requires_grad_()
    actions = torch.zeros(1, 2048, dtype=torch.int64, device=device)
    zero = torch.zeros(1, 2048, device=device)
    targets = KLQTargets(zero - math.log(16), zero, zero + 10.0)
    fused_klq_loss(hidden, weight, actions, zero, targets=targets, tau=0.2).loss.backward()
    # by the taken token: 2 tau (Q - A) (1 - p) h = -2 * 0.2 * 10 * 15/16 * 25
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0].float().cpu(), torch.full((64,), -93.75), rtol=1e-3, atol=0)


def test_second_derivatives_are_refused(device: torch.device) -> None:
    """The gradient is computed in the forward: to autograd it is a constant, and a derivative of it would be wrong."""
    case = make_case(ragged_mask(3, 6), device=device)
    values = case.values.clone().requires_grad_()
    arguments = case.loss_arguments(on_policy=False)
    losses = (
        lambda: fused_klq_loss(case.hidden, case.weight, case.actions, values, **arguments).loss,
        lambda: klq_loss(case.old_logprobs, values, case.targets, **case.layout).loss,
    )
    for loss in losses:
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(loss(), values, create_graph=True)


def test_explained_variance_of_what_is_not_a_number(device: torch.device) -> None:
    case = make_case(ragged_mask(3, 6), device=device)
    targets = case.targets._replace(advantages=case.advantages * float("nan"))
    metrics = klq_loss(case.old_logprobs, case.values, targets, **case.layout).metrics
    assert metrics["explained_variance"].isnan()


def test_non_contiguous_inputs(device: torch.device) -> None:
    case = make_case(ragged_mask(5, 12), device=device)
    gap = torch.randn(5, 12, 3, 16, device=device)
    gap[:, :, 1] = case.hidden
    strided = case.map(lambda t: t.T.contiguous().T if t.dim() == 2 else t)
    strided = replace(strided, hidden=gap[:, :, 1])
    assert not any(t.is_contiguous() for t in (strided.hidden, strided.weight, strided.actions, strided.values))
    sampled = {"gradient": "sampled", "samples": 8, "seed": 3}
    for on_policy, gradient in [(True, {}), (False, {}), (False, sampled)]:
        got = _on_views(strided, on_policy, **gradient)
        expected = _on_views(case, on_policy, **gradient)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
        for name, found in got.gradients.items():
            torch.testing.assert_close(found, expected.gradients[name], rtol=1e-5, atol=1e-7)


def _on_views(case: Case, on_policy: bool, **keywords: Any) -> Outcome:
    """``differentiate`` clones, which would make the inputs contiguous again: here the views themselves are leaves."""
    names = ("hidden", "weight", "bias", "values")
    leaves = {n: getattr(case, n).detach().requires_grad_() for n in names}
    loss, metrics = fused_klq_loss(
        leaves["hidden"], leaves["weight"], case.actions, leaves["values"], bias=leaves["bias"],
        **case.loss_arguments(on_policy=on_policy), **keywords,
    )  # fmt: skip
    return Outcome(
        loss.detach(), metrics, dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    )


def test_expanded_values_get_a_summed_gradient(device: torch.device) -> None:
    """A value broadcast over time: autograd of the expansion must see every token's share."""
    case = make_case(ragged_mask(4, 9), device=device)
    scalar = torch.zeros((), device=device, requires_grad=True)
    keywords = case.loss_arguments(on_policy=False)
    fused_klq_loss(case.hidden, case.weight, case.actions, scalar.expand(4, 9), **keywords).loss.backward()
    per_token = fused(replace(case, values=torch.zeros(4, 9, device=device)), on_policy=False, bias=False)
    assert scalar.grad is not None
    torch.testing.assert_close(scalar.grad, per_token.gradients["values"].sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_per_token_inputs_of_other_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    """Values, rewards and the rest are read as fp32 whatever they are; their gradient comes back in their dtype."""
    case = make_case(ragged_mask(4, 9), device=device)
    names = ("values", "ref_logprobs", "rewards", "bootstrap_values", "trace", "weights")
    other = replace(case, **{n: getattr(case, n).to(dtype) for n in names})
    same = replace(case, **{n: getattr(other, n).float() for n in names})
    switches = {"bootstrap": True, "trace": True, "weights": True}
    got, expected = (fused(c, on_policy=True, **switches) for c in (other, same))
    assert torch.equal(got.loss, expected.loss)
    assert got.gradients["values"].dtype == dtype
    assert torch.equal(got.gradients["values"], expected.gradients["values"].to(dtype))


# ------------------------------------------------------------------------------------------------- nothing for nothing


def test_tied_weights(device: torch.device) -> None:
    """The head is the embedding: both uses add up in one gradient, also where the weight comes as a view of it."""
    case = make_case(ragged_mask(3, 7), vocab=31, width=8, device=device)
    keywords = case.loss_arguments(on_policy=True)
    gradients = []
    for function, c in ((fused_klq_loss, case), (reference.naive_klq_loss, case.double())):
        embedding = c.weight.clone().requires_grad_()
        hidden = c.hidden + torch.nn.functional.embedding(c.actions.roll(1, -1), embedding)
        kwargs = keywords if c is case else c.loss_arguments(on_policy=True)
        function(hidden, embedding[:], c.actions, c.values, **kwargs).loss.backward()
        gradients.append(embedding.grad)
    ours, gold = gradients
    torch.testing.assert_close(ours.cpu().double(), gold, rtol=1e-4, atol=1e-5)


VOCAB, WIDTH = 1009, 24  # V*H, N*H and the workspace are of clearly different sizes
WATCHED = {"vocab": VOCAB, "width": WIDTH}


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "values", "all but values", "nothing"])
def test_gradients_only_where_needed(device: torch.device, frozen: str) -> None:
    """A gradient that is not needed costs neither its product nor its buffer, and changes no other one."""
    case = make_case(ragged_mask(5, 13), device=device, **WATCHED)
    everything = fused(case, on_policy=True)
    names = ("hidden", "weight", "bias", "values")
    needed = {n: n == "values" if frozen == "all but values" else n != frozen for n in names}
    leaves = {n: getattr(case, n).clone().requires_grad_(needed[n]) for n in names}
    with Watch() as watch:
        loss = fused_klq_loss(
            leaves["hidden"], leaves["weight"], case.actions, leaves["values"], bias=leaves["bias"],
            workspace_bytes=workspace_for(4, case), **case.loss_arguments(on_policy=True),
        ).loss  # fmt: skip
        loss.backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == needed[name]
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, everything.gradients[name], rtol=1e-4, atol=1e-6)
    assert bool(watch.at_least(VOCAB * WIDTH * 4)) == needed["weight"]
    problem = loss_memory.Problem(
        int(case.valid.sum()), WIDTH, VOCAB, torch.float32, device, workspace_bytes=workspace_for(4, case),
        hidden_gradient=needed["hidden"], weight_gradient=needed["weight"],
    )  # fmt: skip
    pieces = problem.chunks * -(-VOCAB // problem.strip_entries)
    assert pieces > 1
    assert watch.products() == pieces * (1 + needed["hidden"] + needed["weight"])


def test_no_grad_makes_no_gradient(device: torch.device) -> None:
    case = make_case(ragged_mask(5, 13), device=device, **WATCHED).with_exact_logits()
    leaves = [getattr(case, n).clone().requires_grad_() for n in ("hidden", "weight", "values")]
    hidden, weight, values = leaves
    keywords = case.loss_arguments(on_policy=True)
    with torch.no_grad(), Watch() as watch:
        loss = fused_klq_loss(
            hidden, weight, case.actions, values, workspace_bytes=workspace_for(4, case), **keywords
        ).loss
    assert not loss.requires_grad
    assert torch.equal(loss, fused(case, on_policy=True, rows=4, bias=False).loss)
    assert watch.largest() <= workspace_for(4, case)
    assert not any("row_grad" in call or "scatter_add" in call for call in watch.calls)


@pytest.mark.parametrize("on_policy", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_never_outgrow_the_workspace(device: torch.device, on_policy: bool, dtype: torch.dtype) -> None:
    case = make_case(torch.ones(4, 64, dtype=torch.bool), vocab=VOCAB, width=8, dtype=dtype, device=device)
    workspace = workspace_for(32, case)
    leaves = [getattr(case, n).clone().requires_grad_() for n in ("hidden", "weight", "bias", "values")]
    hidden, weight, bias, values = leaves
    with Watch() as watch:
        fused_klq_loss(
            hidden, weight, case.actions, values, bias=bias, workspace_bytes=workspace, return_entropy=True,
            **case.loss_arguments(on_policy=on_policy),
        ).loss.backward()  # fmt: skip
    fp32_block = 32 * VOCAB * 4  # what a backend may use to look at 16-bit logits in fp32
    assert watch.largest() <= max(workspace, fp32_block)
    assert watch.largest() < 4 * 64 * VOCAB * dtype.itemsize


# ------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("on_policy", MODES)
def test_metrics_are_what_their_names_say(device: torch.device, on_policy: bool, loss_type: str) -> None:
    """Each metric from its definition in float64, over the valid tokens alone, whatever weights and denom are."""
    case = make_case(ragged_mask(5, 13), device=device)
    tau, alpha, bounds = 0.3, 0.7, {"value_clip": 0.4, "log_ratio_clip": 0.25}
    options: dict[str, Any] = {"tau": tau, "alpha": alpha, "loss_type": loss_type, **bounds}
    switches = {"trace": True, "bootstrap": True, **ON_POLICY} if on_policy else {}
    ours = fused(
        case, on_policy=on_policy, return_entropy=True, rows=6, denom=1234.0, weights=True, **options, **switches
    )
    gold = case.double()
    keep = gold.valid
    head = reference.linear_logprobs(gold.hidden, gold.weight, gold.actions, bias=gold.bias)
    logp, values, ref = head.logprobs[keep], gold.values[keep], gold.ref_logprobs[keep]
    if on_policy:
        extra = {"bootstrap_values": gold.bootstrap_values, "trace": gold.trace, **ON_POLICY}
        scan = {"tau": tau, "mask": gold.mask, **extra}
        old = reference.klq_targets(head.logprobs, gold.ref_logprobs, gold.values, gold.rewards, **scan)
        deltas = reference.klq_targets(
            head.logprobs, gold.ref_logprobs, gold.values, gold.rewards, **{**scan, "lam": 0.0}
        ).advantages[keep]
    else:
        old, deltas = gold.targets, None
    d, v, errors = logp - old.old_logprobs[keep], values - old.old_values[keep], old.advantages[keep]
    rho = logp - ref
    returns = errors + old.old_values[keep]
    expected = {
        "loss": gold_of(case, on_policy=on_policy, denom=1234.0, weights=True, **options, **switches).loss,
        "value_mean": values.mean(),
        "advantage_mean": errors.mean(),
        "residual_rms": (tau * d + v - alpha * errors).square().mean().sqrt(),
        "explained_variance": 1 - (returns - values).var() / returns.var(),
        "q_mean": (tau * rho + values).mean(),
        "log_ratio_mean": rho.mean(),
        "kl_ref_k1": rho.mean(),
        "kl_ref_k3": ((-rho).exp() - 1 + rho).mean(),
        "entropy": head.entropy[keep].mean() if head.entropy is not None else None,
    }
    if deltas is not None:
        expected["td_error_rms"] = deltas.square().mean().sqrt()
    else:
        expected["kl_old_k1"] = -d.mean()
        expected["kl_old_k3"] = (d.exp() - 1 - d).mean()
    if loss_type in ("value_clipped", "double_clipped"):
        expected["value_clip_fraction"] = ((tau * d + v).abs() > bounds["value_clip"]).double().mean()
    if loss_type in ("ratio_clipped", "double_clipped"):
        expected["log_ratio_clip_fraction"] = (d.abs() > bounds["log_ratio_clip"]).double().mean()
    assert ours.metrics.keys() == expected.keys()
    for name, value in expected.items():
        metric = ours.metrics[name]
        assert metric.dim() == 0
        assert metric.dtype == torch.float32
        assert not metric.requires_grad
        torch.testing.assert_close(
            metric.cpu().double(), value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    if not on_policy and "clipped" in loss_type:
        fractions = [m for n, m in ours.metrics.items() if "fraction" in n]
        assert all(0 < f < 1 for f in fractions)


def test_metrics_of_klq_loss_are_those_of_the_fused_one(device: torch.device) -> None:
    case = make_case(ragged_mask(5, 13), device=device)
    options: dict[str, Any] = {"loss_type": "double_clipped", "tau": 0.3, "alpha": 0.7}
    one = fused(case, on_policy=False, **options).metrics
    logprobs = linear_logprobs(case.hidden, case.weight, case.actions, bias=case.bias, mask=case.mask).logprobs
    other = klq_loss(
        logprobs, case.values, case.targets, ref_logprobs=case.ref_logprobs, mask=case.mask, **options
    ).metrics
    assert one.keys() == other.keys()
    for name, metric in one.items():
        torch.testing.assert_close(metric, other[name], rtol=1e-5, atol=1e-6)


def test_reference_metrics_only_with_a_reference(device: torch.device) -> None:
    case = make_case(ragged_mask(3, 7), device=device)
    got = fused_klq_loss(case.hidden, case.weight, case.actions, case.values, targets=case.targets, mask=case.mask)
    assert not any("ref" in name or name in ("q_mean", "log_ratio_mean") for name in got.metrics)
    with_reference = fused(case, on_policy=False, bias=False)
    assert torch.equal(got.loss, with_reference.loss)


def test_targets_may_be_a_plain_tuple_and_carry_no_gradient(device: torch.device) -> None:
    case = make_case(ragged_mask(3, 7), device=device)
    targets = KLQTargets(*(t.clone().requires_grad_() for t in case.targets))
    values = case.values.clone().requires_grad_()
    loss = fused_klq_loss(case.hidden, case.weight, case.actions, values, targets=targets, mask=case.mask).loss
    loss.backward()
    assert values.grad is not None
    assert all(t.grad is None for t in targets)
