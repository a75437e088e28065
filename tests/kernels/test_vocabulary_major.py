"""The loss and log-probabilities over many strips of the vocabulary, the way the native backend walks it.

Elsewhere the vocabularies are small enough for one strip. Here they have sixteen, the last of them short.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import (
    GRADIENTS,
    Case,
    assert_as_precise_as,
    differentiate,
    make_case,
    plain_klq_loss,
    plain_logprobs,
    rms,
    workspace_for,
)
from torch import Tensor
from watch import Watch

from klq_kernels import fused_klq_loss, linear_logprobs, reference
from klq_kernels.backends import native
from klq_kernels.commands import loss_memory
from klq_kernels.vocabulary import chunking

pytestmark = pytest.mark.skipif(native.WHY_UNAVAILABLE is not None, reason=f"native: {native.WHY_UNAVAILABLE}")

VOCAB, ENTRIES = 1009, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# where the logits of a chunk lie: in the memory of the weight's gradient, or in a workspace of all or of a few rows;
# the width of the head, which decides that, and the rows that the caller allows
PLACES = {
    "in the gradient": (96, None),
    "in place of an accumulator": (63, None),
    "in a workspace": (16, None),
    "in chunks": (16, 13),
}


@pytest.fixture(autouse=True)
def strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLQ_BACKEND", "native")
    monkeypatch.setattr(chunking, "MOST_ENTRIES", ENTRIES)
    monkeypatch.setattr(chunking, "CPU_WORKSPACE", 20 * chunking.row_stride(VOCAB) * 4)


@pytest.fixture(params=[False, True], ids=["as they are", "widened"])
def widened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Processors with and without 16-bit products, on any machine."""
    monkeypatch.setattr(chunking, "widens", lambda dtype, device: request.param and dtype != torch.float32)
    return request.param


def small_case(dtype: torch.dtype, width: int, spread: str = "peaked") -> Case:
    """120 tokens, of which 70 are valid."""
    mask = torch.zeros(5, 24, dtype=torch.bool)
    mask[:, 7:21] = True
    return make_case(mask, vocab=VOCAB, width=width, spread=spread, dtype=dtype)


def fused(case: Case, rows: int | None, **options: Any) -> Any:
    workspace = None if rows is None else workspace_for(rows, case)
    return differentiate(fused_klq_loss, case, workspace_bytes=workspace, **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spread", ["peaked", "large", "flat"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_policy", [True, False])
def test_precision_of_the_loss(
    widened: bool, poisoned: None, dtype: torch.dtype, spread: str, place: str, on_policy: bool
) -> None:
    width, rows = PLACES[place]
    case = small_case(dtype, width, spread)
    problem = loss_memory.Problem(70, width, VOCAB, dtype, torch.device("cpu"), positions=120)
    narrow = dtype != torch.float32
    whole = place == "in the gradient" or (narrow and place == "in place of an accumulator")
    assert (problem.chunks == 1) == whole
    # a gradient in fp16 adds up in fp32 however few the chunks, and has room for the logits of twice as many tokens
    assert problem.in_gradient == (whole if dtype == torch.float16 else place == "in the gradient")
    bfloat16 = whole and dtype == torch.bfloat16
    assert problem.weight_gradient_dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    arguments = case.loss_arguments(on_policy=on_policy)
    ours = fused(case, rows, **arguments)
    plain = differentiate(plain_klq_loss, case, **arguments)
    exact = case.double()
    gold = differentiate(reference.naive_klq_loss, exact, **exact.loss_arguments(on_policy=on_policy))
    assert_as_precise_as(ours.loss, plain.loss, gold.loss, "loss")
    for name in GRADIENTS:
        assert rms(ours.gradients[name]) > 0
        # over several chunks a 16-bit product is rounded before it is added to d_weight, and once more at the end
        twice = name == "weight" and narrow and not whole
        assert_as_precise_as(
            ours.gradients[name], plain.gradients[name], gold.gradients[name], f"d {name}", factor=2.0 if twice else 1.5
        )


@pytest.mark.parametrize("place", PLACES)
def test_softcap_and_temperature(poisoned: None, place: str) -> None:
    width, rows = PLACES[place]
    case = small_case(torch.float32, width)
    head = {"softcap": 30.0, "temperature": 0.8}
    ours = fused(case, rows, **case.loss_arguments(on_policy=True), **head)
    exact = case.double()
    gold = differentiate(reference.naive_klq_loss, exact, **exact.loss_arguments(on_policy=True), **head)
    for name in GRADIENTS:
        torch.testing.assert_close(ours.gradients[name].double(), gold.gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [None, 3])
def test_precision_of_log_probabilities(widened: bool, poisoned: None, dtype: torch.dtype, rows: int | None) -> None:
    case = small_case(dtype, 96)
    found = {}
    for name, function, c in (
        ("ours", linear_logprobs, case),
        ("plain", plain_logprobs, case),
        ("gold", plain_logprobs, case.map(lambda t: t.double() if t.is_floating_point() else t)),
    ):
        options = {} if function is plain_logprobs else {"mask": case.mask, "return_entropy": True}
        if function is linear_logprobs and rows is not None:
            options["workspace_bytes"] = workspace_for(rows, case)
        hidden, weight = (t.detach().clone().requires_grad_() for t in (c.hidden, c.weight))
        out = function(hidden, weight, c.actions, bias=c.bias, **options)
        valid = [part[case.valid] for part in out]
        sum((k + 1) * part.sum() for k, part in enumerate(valid)).backward()  # different weights on each output
        found[name] = [*valid, hidden.grad, weight.grad]
    for k, (ours, plain, gold) in enumerate(zip(*found.values(), strict=True)):
        assert_as_precise_as(ours, plain, gold, str(k), factor=1.5 if rows is None else 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scoring_and_learning_see_the_same_logits(widened: bool, dtype: torch.dtype) -> None:
    """Logits that are kept in 16 bits for the gradient are also scored in 16 bits, where products run in fp32 too.

    Scoring and learning multiply strips of other sizes, hence ``with_exact_logits``.
    """
    case = small_case(dtype, 96).with_exact_logits()
    arguments = case.loss_arguments(on_policy=False)
    with torch.no_grad():
        scored = fused_klq_loss(case.hidden, case.weight, case.actions, case.values, **arguments).loss
    learned = fused(case, None, bias=False, **arguments)
    assert torch.equal(scored, learned.loss)


def test_logits_take_no_memory_where_the_gradient_has_room_for_them() -> None:
    case = small_case(torch.float32, 96)
    gradient = VOCAB * 96 * 4
    with Watch() as watch:
        fused(case, None, **case.loss_arguments(on_policy=True))
    assert watch.largest() == gradient
    strips = [size for _, size in watch.allocations if size != gradient]
    assert max(strips) <= max(ENTRIES * case.valid.sum() * 4, case.hidden.numel() * 4)


def test_scoring_holds_a_strip_of_logits() -> None:
    case = small_case(torch.float32, 8)
    with torch.no_grad(), Watch() as watch:
        linear_logprobs(case.hidden, case.weight, case.actions, mask=case.mask)
    assert watch.largest() <= ENTRIES * int(case.valid.sum()) * 4


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with NaN between the rows."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_between_strided_rows(dtype: torch.dtype) -> None:
    """oneDNN's products for AMX multiply what follows a row of their left operand by 0, and 0 NaN is NaN."""
    case = small_case(dtype, 45)
    outcomes = []
    for change in (lambda t: t.clone(), strided):
        hidden, weight = (change(t).requires_grad_() for t in (case.hidden, case.weight))
        arguments = case.loss_arguments(on_policy=True)
        fused_klq_loss(hidden, weight, case.actions, case.values, **arguments).loss.backward()
        outcomes.append((hidden.grad, weight.grad))
    for dense, apart in zip(*outcomes, strict=True):
        torch.testing.assert_close(dense, apart, rtol=0.02 if dtype != torch.float32 else 1e-4, atol=1e-4)


THREADS = """
import torch
from klq_kernels import fused_klq_loss
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(1, 250, 256, generator=generator)
weight = torch.randn(20_000, 256, generator=generator) / 16
actions = torch.randint(0, 20_000, (1, 250), generator=generator)
values = torch.randn(1, 250, generator=generator)
outcomes = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    out = fused_klq_loss(*leaves, actions, values, ref_logprobs=values, rewards=values)
    out.loss.backward()
    outcomes.append([out.loss.detach(), *(leaf.grad for leaf in leaves)])
print(all(torch.equal(a, b) for other in outcomes[1:] for a, b in zip(outcomes[0], other)))
"""


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """Also through the products, where the matrix library can be told to; oneDNN, which has the 16-bit ones, cannot."""
    environment = {**os.environ, "MKL_CBWR": "AVX2,STRICT"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.stdout.strip() == "True", done.stderr
