"""An fp32 head for 16-bit models: ``logits_dtype``; and PyTorch's own switches for less precise products."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    assert_as_precise_as,
    assert_same_bits,
    differentiate,
    head_arguments,
    make_case,
    plain_klq_loss,
    ragged_mask,
    workspace_for,
)

from klq_kernels import fused_klq_loss, linear_logprobs, reference
from klq_kernels.vocabulary.precision import own_settings

SIXTEEN_BITS = [torch.bfloat16, torch.float16]
HEADS = [{}, {"temperature": 0.7}, {"softcap": 20.0}]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_log_probabilities_are_those_of_unrounded_logits(
    device: torch.device, dtype: torch.dtype, options: dict[str, float]
) -> None:
    case = make_case(ragged_mask(5, 24), vocab=1009, width=64, spread="large", dtype=dtype, device=device)
    hidden, weight, bias = head_arguments(case)
    gold = reference.linear_logprobs(
        hidden.double(), weight.double(), case.actions, bias=None if bias is None else bias.double(), **options
    )

    def worst(logits_dtype: torch.dtype | None, rows: int | None = None) -> float:
        found = linear_logprobs(
            hidden, weight, case.actions, bias=bias, logits_dtype=logits_dtype, return_entropy=True,
            workspace_bytes=None if rows is None else 2 * workspace_for(rows, case), **options,
        )  # fmt: skip
        assert found.entropy is not None
        return max(
            float((found.logprobs - gold.logprobs).abs().max()), float((found.logsumexp - gold.logsumexp).abs().max())
        )

    assert worst(torch.float32) < 1e-4
    assert worst(torch.float32, rows=7) < 1e-4
    assert worst(None) > 1e-3, "the logits of this case would be exact in 16 bits, so that the test shows nothing"


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("master", [False, True], ids=["", "master"])
def test_the_loss_and_its_gradients(
    device: torch.device, dtype: torch.dtype, on_policy: bool, options: dict[str, Any], rows: int | None, master: bool
) -> None:
    case = make_case(ragged_mask(5, 24), vocab=1009, width=64, spread="peaked", dtype=dtype, device=device)
    if master:
        case = replace(case, weight=case.weight.float())
    given = case.loss_arguments(on_policy=on_policy)
    limit = None if rows is None else 2 * workspace_for(rows, case)
    ours = differentiate(fused_klq_loss, case, logits_dtype=torch.float32, workspace_bytes=limit, **given, **options)
    gold_case = case.double()
    gold = differentiate(
        reference.naive_klq_loss, gold_case, **gold_case.loss_arguments(on_policy=on_policy), **options
    )
    torch.testing.assert_close(ours.loss.double().cpu(), gold.loss.cpu(), rtol=1e-4, atol=1e-6)
    half = make_case(ragged_mask(5, 24), vocab=1009, width=64, spread="peaked", dtype=dtype, device=device)
    plain = differentiate(plain_klq_loss, half, **half.loss_arguments(on_policy=on_policy), **options)
    for name, gradient in ours.gradients.items():
        assert gradient.dtype == getattr(case, name).dtype
        twice = name == "weight" and rows is not None  # over several chunks it may be rounded twice
        factor = 2.0 if twice else 1.5
        assert_as_precise_as(gradient, plain.gradients[name], gold.gradients[name], f"d {name}", factor=factor)


def test_gradients_through_log_probabilities(device: torch.device) -> None:
    case = make_case(ragged_mask(5, 24), vocab=1009, width=64, dtype=torch.bfloat16, device=device)
    hidden, weight, _ = head_arguments(case)
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    found = linear_logprobs(*leaves, case.actions, logits_dtype=torch.float32).logprobs.sum()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    gold = reference.linear_logprobs(*exact, case.actions).logprobs.sum()
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(gold, exact), strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a - b).norm() / b.norm()) < 1e-2


def test_fp32_hidden_states_have_fp32_logits_anyway(device: torch.device) -> None:
    case = make_case(ragged_mask(3, 9), device=device)
    given = case.loss_arguments(on_policy=False)
    a, b = (differentiate(fused_klq_loss, case, logits_dtype=d, **given) for d in (None, torch.float32))
    assert_same_bits(a, b)


@pytest.mark.parametrize("wrong", [torch.float16, torch.float64, "float32"])
def test_other_logits_are_refused(wrong: object) -> None:
    hidden, weight = torch.randn(3, 4).bfloat16(), torch.randn(9, 4).bfloat16()
    with pytest.raises(ValueError, match=r"logits_dtype: must be torch\.float32, or None"):
        linear_logprobs(hidden[None], weight, torch.zeros(1, 3, dtype=torch.int64), logits_dtype=wrong)  # type: ignore[arg-type]


@contextmanager
def careless() -> Iterator[None]:
    """All of PyTorch's switches for faster, less precise products; restored afterwards."""
    matmul = torch.backends.cuda.matmul
    precision = torch.get_float32_matmul_precision()
    reductions = {name: getattr(matmul, name) for name in REDUCTIONS}
    torch.set_float32_matmul_precision("medium")
    for name in REDUCTIONS:
        setattr(matmul, name, True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for name, value in reductions.items():
            setattr(matmul, name, value)


REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
def test_the_switches_of_pytorch_do_not_reach_our_products(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(ragged_mask(5, 24), vocab=1009, width=64, spread="large", dtype=dtype, device=device)
    given = case.loss_arguments(on_policy=True)
    usual = differentiate(fused_klq_loss, case, **given)
    hidden, weight, bias = head_arguments(case)
    scored = linear_logprobs(hidden, weight, case.actions, bias=bias).logprobs
    with careless():
        unchanged = differentiate(fused_klq_loss, case, **given)
        again = linear_logprobs(hidden, weight, case.actions, bias=bias).logprobs
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.equal(scored, again)
    assert_same_bits(usual, unchanged)


def test_settings_come_back_after_an_error() -> None:
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision

    def fail() -> None:
        with own_settings(torch.device("cpu")):
            assert settings.fp32_precision == "ieee"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert settings.fp32_precision == before


def test_settings_of_overlapping_calls() -> None:
    """A call that ends takes nothing away from another that still runs; the last one restores."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, cpu = settings.fp32_precision, torch.device("cpu")
    settings.fp32_precision = "bf16"
    try:
        first, second = own_settings(cpu), own_settings(cpu)
        on_other_thread = ThreadPoolExecutor(1).submit
        first.__enter__()
        on_other_thread(second.__enter__).result()
        first.__exit__(None, None, None)
        assert settings.fp32_precision == "ieee"
        on_other_thread(second.__exit__, None, None, None).result()
        assert settings.fp32_precision == "bf16"
    finally:
        settings.fp32_precision = before


def entropies(head: str, steps: int = 200) -> torch.Tensor:
    """float64 [steps]: the mean entropy of a small policy after each update, learning with this head.

    ``head``: "gold" (float64), "fp32" or "bf16" logits. Hidden states are bf16, with a common offset as in trained
    models; the weight is an fp32 master. Actions are samples of the reference, and so the same for all heads.
    """
    g = torch.Generator().manual_seed(0)
    vocab, width, states, tokens = 257, 32, 16, 64
    table = torch.randn(states, width, generator=g)
    weight = 2.0 * torch.randn(vocab, width, generator=g)
    offset = 8.0 * F.one_hot(torch.tensor(0), width)
    weight[:, 0] = 4.0
    reference_logits = (table + offset) @ weight.T
    worth = torch.rand(states, vocab, generator=g)
    optimizer = torch.optim.AdamW([table.requires_grad_(), weight.requires_grad_()], lr=3e-3, weight_decay=0.0)
    found = []
    for _ in range(steps):
        at = torch.randint(states, (tokens,), generator=g)
        gumbel = -(-torch.rand(tokens, vocab, generator=g).log()).log()
        actions = (reference_logits[at] + gumbel).argmax(-1)
        ref = reference_logits[at].log_softmax(-1).gather(-1, actions[:, None])[:, 0]
        ends = torch.arange(tokens + 1, dtype=torch.int32)
        hidden, values = (table + offset)[at].bfloat16(), torch.zeros(tokens)
        given: dict[str, Any] = {"ref_logprobs": ref, "rewards": worth[at, actions], "cu_seqlens": ends, "tau": 0.2}
        if head == "gold":
            double = {**given, "ref_logprobs": ref.double(), "rewards": given["rewards"].double()}
            loss = reference.naive_klq_loss(hidden.double(), weight.double(), actions, values.double(), **double).loss
        else:
            dtype = torch.float32 if head == "fp32" else None
            loss = fused_klq_loss(hidden, weight, actions, values, logits_dtype=dtype, **given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logp = ((table + offset).detach().double() @ weight.detach().double().T).log_softmax(-1)
        found.append(-(logp.exp() * logp).sum(-1).mean())
    return torch.stack(found)


def test_the_entropy_does_not_drift_over_200_updates() -> None:
    """Rounded logits bias every update a little, which adds up; an fp32 head follows float64."""
    gold = entropies("gold")
    drift = {head: float((entropies(head) - gold).abs().max()) for head in ("fp32", "bf16")}
    assert drift["fp32"] < 2e-3
    assert drift["bf16"] > 5 * drift["fp32"], "the logits of this policy would be exact in 16 bits: nothing is shown"


def test_settings_hold_until_the_last_of_several_threads_is_done() -> None:
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with own_settings(torch.device("cpu")):
            inside.set()
            leave.wait(60)

    settings.fp32_precision = "bf16"
    try:
        thread = threading.Thread(target=other)
        with own_settings(torch.device("cpu")):
            thread.start()
            assert inside.wait(60)
        assert settings.fp32_precision == "ieee"
        leave.set()
        thread.join()
        assert settings.fp32_precision == "bf16"
    finally:
        leave.set()
        settings.fp32_precision = before
