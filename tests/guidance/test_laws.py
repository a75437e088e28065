"""The laws of a guide: tilts against the oracle for every eta, losses and means by their definitions, wrong input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klq_kernels import reference
from klq_kernels.guidance import Law, sequence_mean
from klq_kernels.guidance.laws import KINDS

ETAS = (1e-3, 0.01, 0.1, 1.0, 10.0, 1e4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-30.0, -10.0)])
def test_the_tilt_is_the_oracles_and_never_overflows(kind: str, eta: float, low: float, high: float) -> None:
    law = Law(kind, atoms=7, low=low, high=high)
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(64, law.outputs, generator=generator) * torch.logspace(-2, 3, 64)[:, None]
    exact = reference.guide_tilt(outputs.double(), kind, eta, low=low, high=high)
    found = law.tilt(outputs, eta)
    assert found.dtype == torch.float32
    scale = 1 + max(abs(low), abs(high)) / eta
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_outputs_are_read_in_fp32(kind: str) -> None:
    law = Law(kind)
    outputs = torch.randn(9, law.outputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.testing.assert_close(law.tilt(outputs, 0.05), law.tilt(outputs.float(), 0.05), rtol=0, atol=0)
    torch.testing.assert_close(law.mean(outputs), law.mean(outputs.float()), rtol=0, atol=0)


def test_losses_are_those_of_the_table() -> None:
    rewards = torch.tensor([-1.0, 0.2, 1.0])
    share = (rewards.double() + 1) / 2
    z = torch.tensor([[0.3], [-2.0], [40.0]])
    p = z.double().sigmoid().squeeze(-1)
    bernoulli = Law("bernoulli", low=-1, high=1)
    wanted = -(share * p.log() + (1 - share) * torch.nn.functional.logsigmoid(-z.double()).squeeze(-1))
    torch.testing.assert_close(bernoulli.loss(z, rewards).double(), wanted, rtol=1e-5, atol=1e-6)
    squared = Law("mse", low=-1, high=1).loss(z, rewards).double()
    torch.testing.assert_close(squared, (p - share).square(), rtol=1e-5, atol=1e-6)
    five = Law("categorical", atoms=5, low=-1, high=1)  # atoms -1, -.5, 0, .5, 1: nearest to 0.2 is 0
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    wanted = -logits.double().log_softmax(-1)[torch.arange(3), torch.tensor([0, 2, 4])]
    torch.testing.assert_close(five.loss(logits, rewards).double(), wanted, rtol=1e-5, atol=1e-6)
    assert five.support().tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert five.loss(logits.expand(2, 3, 5), rewards.expand(2, 3)).shape == (2, 3)


@given(st.integers(2, 12), st.floats(-50, 50), st.floats(0.1, 100))
def test_the_tilt_lies_between_the_ends_and_above_the_mean(atoms: int, low: float, width: float) -> None:
    """Jensen: eta log E[exp(R / eta)] >= E[R]; and it grows as eta falls."""
    law = Law("categorical", atoms=atoms, low=low, high=low + width)
    outputs = 3 * torch.randn(16, atoms, generator=torch.Generator().manual_seed(atoms))
    mean = law.mean(outputs)
    slack = 1e-4 * (abs(low) + width)
    before = mean - slack
    for eta in (10 * width, width, width / 10, width / 1000):
        certain = eta * law.tilt(outputs, eta)
        assert (certain >= before - slack).all()
        assert (certain <= low + width + slack).all()
        before = certain


def test_a_sequence_counts_once_however_long() -> None:
    losses = torch.tensor([1.0, 3.0, 10.0, 2.0, 2.0, 2.0])
    assert sequence_mean(losses, torch.tensor([0, 2, 2, 3, 6])).item() == pytest.approx((2 + 10 + 2) / 3)
    assert sequence_mean(losses[:0], torch.tensor([0, 0])).item() == 0.0


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("kind", lambda: Law("beta")),
        ("atoms", lambda: Law("categorical", atoms=1)),
        ("atoms", lambda: Law("categorical", atoms=2.5)),  # type: ignore[arg-type]
        ("high", lambda: Law(low=1.0, high=1.0)),
        ("low", lambda: Law(low=math.nan)),
        ("eta", lambda: Law().tilt(torch.zeros(1, 1), 0.0)),
        ("eta", lambda: Law().tilt(torch.zeros(1, 1), math.nan)),
        ("outputs", lambda: Law("categorical").tilt(torch.zeros(1, 3), 1.0)),
        ("rewards", lambda: Law().loss(torch.zeros(2, 1), torch.tensor([0.0, 1.5]))),
        ("rewards", lambda: Law().loss(torch.zeros(2, 1), torch.tensor([0.0, math.nan]))),
        ("rewards", lambda: Law().loss(torch.zeros(2, 1), torch.zeros(3))),
        ("cu_seqlens", lambda: sequence_mean(torch.zeros(6), torch.tensor([1, 2, 6], dtype=torch.int32))),
        ("cu_seqlens", lambda: sequence_mean(torch.zeros(6), torch.tensor([0, 4, 2, 6], dtype=torch.int32))),
        ("cu_seqlens", lambda: sequence_mean(torch.zeros(6), torch.tensor([0, 2, 9], dtype=torch.int32))),
        ("losses", lambda: sequence_mean(torch.zeros(2, 3), torch.tensor([0, 2, 6], dtype=torch.int32))),
    ],
)
def test_wrong_arguments_are_named(argument: str, make: object) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        make()  # type: ignore[operator]
