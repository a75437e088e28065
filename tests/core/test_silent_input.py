"""Input that was once taken in silence, or blamed on another argument: a right answer, or an error that names it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import make_case, ragged_mask, rms
from torch._subclasses.fake_tensor import FakeTensorMode

from klq_kernels import fused_klq_loss, gae, klq_loss, linear_logprobs, pack, reference, reverse_scan

MASK = ragged_mask(3, 7)


def loss(**changes: Any) -> Any:
    case = make_case(MASK, vocab=19, width=4)
    arguments = {n: getattr(case, n) for n in ("hidden", "weight", "actions", "values")}
    return fused_klq_loss(**{**arguments, **case.loss_arguments(on_policy=True), **changes})


def test_a_packing_keeps_the_mask_it_was_built_of() -> None:
    mask = MASK.clone()
    packing = pack(mask)
    before = loss(mask=None, packing=packing).loss
    values = torch.randn(3, 7)
    returns = gae(values, values, packing=packing)
    mask[:] = False
    assert torch.equal(loss(mask=None, packing=packing).loss, before)
    assert torch.equal(gae(values, values, packing=packing), returns)
    ends = torch.tensor([0, 4, 6], dtype=torch.int32)
    packed = pack(torch.ones(6, dtype=torch.bool), cu_seqlens=ends)
    ends.zero_()
    assert packed.cu_seqlens.tolist() == [0, 4, 6]


def test_a_packing_edited_by_hand_is_refused() -> None:
    packing = pack(MASK)
    for change in (
        {"rows": packing.rows[:-1]},
        {"rows": packing.rows + 21},
        {"rows": packing.rows.int()},
        {"mask": packing.mask[:-1]},
        {"cu_seqlens": packing.cu_seqlens.long()},
        {"row_cu_seqlens": packing.row_cu_seqlens[:-1]},
        {"rows": [0, 1]},
    ):
        with pytest.raises(ValueError, match=r"^packing:"):
            loss(mask=None, packing=packing._replace(**change))


@pytest.mark.parametrize("value", [0.0, -3.0, float("nan"), float("inf")])
def test_a_denom_in_a_tensor_is_checked_like_a_number(value: float) -> None:
    for denom in (value, torch.tensor(value)):
        with pytest.raises(ValueError, match=r"^denom:"):
            loss(denom=denom)
    case = make_case(MASK)
    with pytest.raises(ValueError, match=r"^denom:"):
        klq_loss(case.ref_logprobs, case.values, case.targets, mask=MASK, denom=torch.tensor(value))


@pytest.mark.parametrize("value", [1e39, 1e-50, 10**400, True, np.float32(2.0)], ids="big tiny int bool numpy".split())
@pytest.mark.parametrize(
    "name", ["softcap", "temperature", "tau", "alpha", "huber_delta", "value_clip", "log_ratio_clip", "gamma", "denom"]
)
def test_numbers_that_fp32_cannot_hold_are_refused(name: str, value: Any) -> None:
    if name == "gamma" and value == 1e-50:
        return  # as good as 0, which a discount may be
    with pytest.raises(ValueError, match=rf"^{name}:"):
        loss(**{name: value})


@pytest.mark.parametrize("softcap", [1e-30, 1e-3, 1e30])
def test_numbers_at_the_ends_of_what_is_accepted_are_right(softcap: float) -> None:
    case = make_case(MASK, vocab=19, width=4)
    ours = linear_logprobs(case.hidden, case.weight, case.actions, softcap=softcap, mask=MASK).logprobs
    hidden, weight = case.hidden.double(), case.weight.double()
    gold = reference.linear_logprobs(hidden, weight, case.actions, softcap=softcap).logprobs
    torch.testing.assert_close(ours[MASK].double(), gold[MASK], rtol=1e-5, atol=1e-5)


def test_the_decay_of_a_scan_has_a_size() -> None:
    with pytest.raises(ValueError, match=r"^decay:"):
        reverse_scan(torch.zeros(2, 3), 10**400)


def test_misshapen_actions_are_blamed_and_not_the_mask() -> None:
    case = make_case(MASK, vocab=19, width=4)
    with pytest.raises(ValueError, match=r"^actions: .*hidden and mask"):
        loss(actions=case.actions[:, :-1])
    with pytest.raises(ValueError, match=r"^actions:"):
        linear_logprobs(case.hidden, case.weight, case.actions[:-1], mask=MASK)


class Answers(torch.Tensor):
    """A subclass that answers operators itself, as DTensor and MaskedTensor do."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("computed with")


class Named(torch.Tensor):
    """A subclass that only adds a name."""


@pytest.mark.parametrize("name", ["hidden", "weight", "actions", "values", "mask", "ref_logprobs", "scores"])
def test_tensors_that_are_no_memory_are_refused(name: str) -> None:
    case = make_case(MASK, vocab=19, width=4)
    argument = "rewards" if name == "scores" else name
    with pytest.raises(ValueError, match=rf"^{argument}: must be a plain tensor, got a Answers"):
        loss(**{argument: Answers(getattr(case, name))})


def test_subclasses_that_only_add_to_a_tensor_pass() -> None:
    case = make_case(MASK, vocab=19, width=4)
    named = loss(hidden=case.hidden.as_subclass(Named), weight=torch.nn.Parameter(case.weight))
    assert torch.equal(torch.Tensor(named.loss), loss().loss)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_narrow_head_over_a_large_vocabulary_is_as_precise_as_torch(device: torch.device, width: int) -> None:
    """A matrix times a vector is added up term after term by some libraries: 256,000 of them lose four digits."""
    vocab, n = 256_000, 7
    generator = torch.Generator().manual_seed(width)
    hidden, weight = (torch.randn(k, width, generator=generator) for k in (n, vocab))
    actions = torch.randint(vocab, (n,), generator=generator)
    ends = torch.tensor([0, n], dtype=torch.int32)

    def gradient(function: Any, dtype: torch.dtype) -> torch.Tensor:
        leaf = hidden.to(device, dtype).clone().requires_grad_()
        function(leaf, weight.to(device, dtype)).sum().backward()
        return leaf.grad.cpu().double()

    def plain(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (h @ w.T).log_softmax(-1).gather(1, actions.to(device)[:, None])

    def ours(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_logprobs(h, w, actions.to(device), cu_seqlens=ends.to(device)).logprobs

    gold = gradient(plain, torch.float64)
    allowed = rms(gradient(plain, torch.float32) - gold)
    # torch's own error varies with the shape: a few units in the last place are always allowed
    assert rms(gradient(ours, torch.float32) - gold) <= 1.5 * allowed + 2e-6 * rms(gold)


@pytest.mark.parametrize("name", ["weight", "actions", "values"])
def test_fake_tensors_among_real_ones_are_named(name: str) -> None:
    given = {
        "hidden": torch.randn(1, 3, 4), "weight": torch.randn(9, 4), "actions": torch.zeros(1, 3, dtype=torch.int64),
        "values": torch.zeros(1, 3), "ref_logprobs": torch.zeros(1, 3), "rewards": torch.zeros(1),
    }  # fmt: skip
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(given[name])
    with pytest.raises(ValueError, match=f"^{name}: is a FakeTensor, and hidden is a Tensor"):
        fused_klq_loss(**{**given, name: fake})
