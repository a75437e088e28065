"""Operators name their arguments once: no part of one knows where an argument stands."""

from __future__ import annotations

import typing
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import klq_kernels
from klq_kernels.ops import fused_loss, klq_loss, linear_kl, linear_logprobs, linear_select
from klq_kernels.ops.operator import Operator, Parts

N, H, V = 6, 4, 11
NUMBERS = {
    "gamma": 0.9, "lam": 0.9, "tau": 0.1, "alpha": 0.9, "huber_delta": 1.0, "value_clip": 0.2, "log_ratio_clip": 0.2,
    "temperature": 0.7, "ref_temperature": 1.3,
}  # fmt: skip
OPERATORS = {
    "fused_klq_loss": (fused_loss.fused_klq_loss, fused_loss.PARTS),
    "klq_loss": (klq_loss.klq_loss, klq_loss.PARTS),
    "linear_kl": (linear_kl.linear_kl, linear_kl.PARTS),
    "linear_kl_backward": (linear_kl.linear_kl_backward, linear_kl.BACKWARD_PARTS),
    "linear_logprobs": (linear_logprobs.linear_logprobs, linear_logprobs.PARTS),
    "linear_logprobs_backward": (linear_logprobs.linear_logprobs_backward, linear_logprobs.BACKWARD_PARTS),
    "linear_select": (linear_select.linear_select, linear_select.PARTS),
    "linear_select_backward": (linear_select.linear_select_backward, linear_select.BACKWARD_PARTS),
}


def some(name: str, hint: Any) -> Any:
    """An argument of the operators, by its name and type."""
    generator = torch.Generator().manual_seed(len(name))
    shapes = {
        "hidden": (N, H), "weight": (V, H), "bias": (V,), "ref_hidden": (N, 3), "ref_weight": (V, 3), "ref_bias": (V,),
        "scores": (2,), "bootstrap_values": (2,), "denom": (), "slope": (N, 2, 1), "d_logits": (N, 2, 1),
    }  # fmt: skip
    special: dict[str, Any] = {
        "ids": torch.arange(2 * N).view(N, 2) % V, "atoms": 1, "actions": torch.arange(N),
        "cu_seqlens": torch.tensor([0, 4, 6], dtype=torch.int32), "rows": None,
        "mask": torch.tensor([True, True, False, True, True, True]), "loss_type": "l2", "softcap": 5.0,
        "ref_softcap": None, "workspace_bytes": None, "own_gradients": False, "samples": 0, "seed": None, "group": "",
        "shard_sizes": [], "peers": "", "counts": [], **NUMBERS,
    }  # fmt: skip
    if name in special:
        return special[name]
    if hint is bool:
        return True
    return 1.0 + torch.rand(shapes.get(name, (N,)), generator=generator)


def longer(parts: Parts) -> Parts:
    """The same operator with one more argument, a number amid the tensors."""
    fields = list(typing.get_type_hints(parts.arguments).items())
    fields.insert(3, ("dummy", float))
    arguments = NamedTuple("Longer", fields)  # type: ignore[misc]
    for name, attribute in vars(parts.arguments).items():
        if isinstance(attribute, property):
            setattr(arguments, name, attribute)
    return parts._replace(arguments=arguments)


def outcome(op: Any, given: Any, differentiable: bool) -> list[Tensor]:
    """Results, and the gradients by all floating-point arguments that have one."""
    leaves = [t for t in given if isinstance(t, Tensor) and t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_(differentiable)
    results = op(*given)
    if not differentiable:
        return list(results)
    total = sum(result.sum() for result in results if result.requires_grad)
    assert isinstance(total, Tensor)
    return [*results, *(g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None)]


@pytest.mark.parametrize("name", OPERATORS)
def test_an_argument_in_the_middle_moves_nothing(name: str) -> None:
    op, parts = OPERATORS[name]
    again = longer(parts)
    known = {field: some(field, hint) for field, hint in typing.get_type_hints(parts.arguments).items()}
    differentiable = not name.endswith("_backward")
    before = outcome(op, parts.arguments(**known), differentiable)
    with_dummy = Operator(f"klq_tests::{name}", again)
    after = outcome(with_dummy, again.arguments(**known, dummy=0.5), differentiable)
    assert len(before) == len(after) > len(parts.results._fields) * differentiable
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    checks = torch.library.opcheck(with_dummy.definition, with_dummy.packed(*again.arguments(**known, dummy=0.5)))
    assert set(checks.values()) == {"SUCCESS"}


def gradients(op: Any, given: list[Any], names: list[str], learnt: list[str]) -> dict[str, Tensor | None]:
    """Results, and the gradients by the arguments in ``learnt`` alone."""
    leaves = {n: v.detach().requires_grad_(n in learnt) for n, v in zip(names, given, strict=True) if floats(v)}
    results = op(*(leaves.get(n, v) for n, v in zip(names, given, strict=True)))
    found: dict[str, Tensor | None] = {f"result {i}": result.detach() for i, result in enumerate(results)}
    if learnt:
        total = sum(result.square().sum() for result in results if result.requires_grad)
        assert isinstance(total, Tensor)
        found |= dict(
            zip(learnt, torch.autograd.grad(total, [leaves[n] for n in learnt], allow_unused=True), strict=True)
        )
    return found


def floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("name", OPERATORS)
def test_a_call_that_nothing_watches_gives_the_bits_of_the_registered_operator(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients by all arguments, by each alone, and by none; forwards under no_grad too."""
    op, parts = OPERATORS[name]
    hints = typing.get_type_hints(parts.arguments)
    names, given = list(hints), [some(each, hint) for each, hint in hints.items()]
    differentiable = [] if name.endswith("backward") else [n for n, v in zip(names, given, strict=True) if floats(v)]
    for learnt in ([], differentiable, *([each] for each in differentiable)):
        with torch.set_grad_enabled(bool(learnt) or not differentiable):
            found = gradients(op, given, names, learnt)
            with monkeypatch.context() as patched:
                patched.setattr("klq_kernels.ops.operator._is_watched", lambda arguments: True)
                wanted = gradients(op, given, names, learnt)
        assert found.keys() == wanted.keys()
        for each, value in wanted.items():
            assert (value is None) == (found[each] is None), (learnt, each)
            assert value is None or torch.equal(value, found[each]), (learnt, each)  # type: ignore[arg-type]


def test_what_watches_sees_the_registered_operator() -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Look(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for mode in (Watch, Look):
        seen.clear()
        with mode():
            klq_kernels.linear_logprobs(torch.randn(1, N, H), torch.randn(V, H), torch.arange(N)[None])
        assert any("klq_kernels.linear_logprobs" in name for name in seen), (mode, seen)
        assert not any("mm" in name for name in seen), (mode, seen)
