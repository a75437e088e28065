"""The head's products, where the processor multiplies 16-bit numbers and where they are widened strip by strip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from klq_kernels.vocabulary import chunking, products

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["as they are", "widened"])
def widened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways on any machine, over several strips, the last of them short."""
    monkeypatch.setattr(chunking, "widens", lambda dtype, device: request.param and dtype != torch.float32)
    monkeypatch.setattr(chunking, "WIDE_COLUMNS", 16)
    monkeypatch.setattr(chunking, "STRIP_ROWS", 16)
    return request.param


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [5, 24], weight [41, 24] and a strided buffer of logits [5, 41]."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, buffer = (torch.randn(shape, generator=g).to(dtype) for shape in ((5, 24), (41, 24), (5, 64)))
    return hidden, weight, buffer[:, :41]


def close(got: Tensor, want: Tensor, roundings: int = 1) -> None:
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=roundings * eps, atol=roundings * eps * float(want.abs().max()))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_projections(widened: bool, dtype: torch.dtype, with_bias: bool) -> None:
    hidden, weight, buffer = operands(dtype)
    bias = weight[:, 0].clone() if with_bias else None
    out = products.project(hidden, weight, bias, buffer)
    want = hidden.double() @ weight.double().T + (bias.double() if with_bias else 0.0)
    assert out.data_ptr() == buffer.data_ptr()
    close(out, want)
    for written in {dtype, torch.float32}:
        back = products.project_back(buffer, weight, written)
        assert back.dtype == written
        close(back, buffer.double() @ weight.double())


@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_weight_gradients_add_up(widened: bool, dtype: torch.dtype, in_fp32: bool) -> None:
    hidden, _, dlogits = operands(dtype)
    total = torch.full((41, 24), float("nan"), dtype=torch.float32 if in_fp32 else dtype)
    products.accumulate(total, dlogits, hidden, first=True)
    want = dlogits.double().T @ hidden.double()
    rounded_before = in_fp32 and dtype != torch.float32 and not widened
    close(total.to(dtype) if rounded_before else total, want, roundings=4)
    products.accumulate(total, dlogits, hidden, first=False)
    close(total.to(dtype) if rounded_before else total, 2 * want, roundings=4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("multiplies", [False, True])
def test_widening_follows_the_processor(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, multiplies: bool) -> None:
    monkeypatch.setattr(chunking, "_multiplies", lambda asked: asked == torch.float32 or multiplies)
    assert not chunking.widens(torch.float32, CPU)
    assert not chunking.widens(dtype, torch.device("cuda"))
    assert chunking.widens(dtype, CPU) is not multiplies
