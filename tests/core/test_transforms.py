"""Function transforms and serialisation: what works gives the numbers of a plain loop, what does not says so."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, make_case, ragged_mask
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from klq_kernels import (
    fused_klq_loss,
    gae,
    klq_loss,
    klq_targets,
    lambda_returns,
    linear_logprobs,
    pack,
    reverse_scan,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*performance drop.*")
CASE = make_case(ragged_mask(3, 6), vocab=17, width=4)


def fused(hidden: Tensor, weight: Tensor, values: Tensor, case: Case = CASE) -> Tensor:
    return fused_klq_loss(hidden, weight, case.actions, values, targets=case.targets, mask=case.mask).loss


def logprobs(hidden: Tensor) -> Tensor:
    return linear_logprobs(hidden, CASE.weight, CASE.actions, mask=CASE.mask).logprobs.sum()


DIFFERENTIABLE: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "hidden": (lambda x: fused(x, CASE.weight, CASE.values), CASE.hidden),
    "weight": (lambda x: fused(CASE.hidden, x, CASE.values), CASE.weight),
    "values": (lambda x: fused(CASE.hidden, CASE.weight, x), CASE.values),
    "hidden of log-probabilities": (logprobs, CASE.hidden),
    "logprobs": (lambda x: klq_loss(x, CASE.values, CASE.targets, mask=CASE.mask).loss, CASE.old_logprobs),
    "delta": (lambda x: reverse_scan(x, 0.9).sum(), CASE.rewards),
    "decay": (lambda x: reverse_scan(CASE.rewards, x).sum(), CASE.trace),
}


@pytest.mark.parametrize("name", ["hidden", "values"])
def test_vmap_has_its_gradients_when_compiled(name: str) -> None:
    function, x = DIFFERENTIABLE[name]
    gradients = []
    for call in (vmap(function), torch.compile(lambda s: vmap(function)(s), backend="aot_eager")):
        stack = torch.stack([x, 1.5 * x]).detach().requires_grad_()
        call(stack).sum().backward()
        gradients.append(stack.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_has_the_gradients_of_a_loop(name: str) -> None:
    """For example a critic for each of two runs: batched and unbatched arguments both get gradients."""
    function, x = DIFFERENTIABLE[name]
    stack = torch.stack([x, 1.5 * x]).detach().requires_grad_()
    vmap(function)(stack).sum().backward()
    together = stack.grad
    stack.grad = None
    (function(stack[0]) + function(stack[1])).backward()
    assert together is not None
    assert together.abs().sum() > 0
    torch.testing.assert_close(together, stack.grad)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused(name: str) -> None:
    """Its derivative would silently be 0."""
    function, x = DIFFERENTIABLE[name]
    argument = name.partition(" ")[0]
    with pytest.raises(RuntimeError, match=f"^{argument}: forward-mode"):
        jvp(function, (x.detach(),), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match=f"^{argument}: forward-mode"):
        jvp(vmap(function), (x.detach()[None],), (torch.ones_like(x)[None],))
    with forward_ad.dual_level():
        function(x.detach())
        vmap(function)(x.detach()[None])
        with pytest.raises(RuntimeError, match=f"^{argument}: forward-mode"):
            function(forward_ad.make_dual(x.detach(), torch.ones_like(x)))


def test_forward_mode_is_refused_when_compiled() -> None:
    function, x = DIFFERENTIABLE["hidden"]
    compiled = torch.compile(lambda x, t: jvp(function, (x,), (t,)), backend="aot_eager")
    with pytest.raises(Exception, match="forward-mode"):
        compiled(x.detach(), torch.ones_like(x))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms_that_differentiate_are_refused(name: str) -> None:
    function, x = DIFFERENTIABLE[name]
    for differentiated in (torch.func.grad(function), lambda x: torch.func.vjp(function, x)):
        with pytest.raises(RuntimeError, match=r": torch\.func\.grad and its relatives .* are not supported"):
            differentiated(x.detach())
    with pytest.raises(RuntimeError, match=r": torch\.func\.grad and its relatives .* are not supported"):
        vmap(torch.func.grad(function))(x.detach()[None])


CONSTANTS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "rewards: gae": (lambda x: gae(x, CASE.values, mask=CASE.mask), CASE.rewards),
    "values: lambda_returns": (lambda x: lambda_returns(CASE.rewards, x, mask=CASE.mask), CASE.values),
    "trace: klq_targets": (lambda x: targets(trace=x), CASE.trace),
    "bootstrap_values: klq_targets": (lambda x: targets(bootstrap_values=x), CASE.bootstrap_values),
}


def targets(**given: Tensor) -> Tensor:
    return klq_targets(CASE.old_logprobs, CASE.ref_logprobs, CASE.values, CASE.rewards, mask=CASE.mask, **given)[2]


@pytest.mark.parametrize("name", CONSTANTS)
def test_transforms_of_what_has_no_gradient_are_refused(name: str) -> None:
    """Their derivative would silently be 0. What is detached is a constant, as under backward."""
    function, x = CONSTANTS[name][0], CONSTANTS[name][1].detach()
    refused = f"^{name} is computed without gradient"
    with pytest.raises(RuntimeError, match=refused):
        jvp(function, (x,), (torch.ones_like(x),))
    for differentiated in (torch.func.grad(lambda x: function(x).sum()), torch.func.jacrev(function)):
        with pytest.raises(RuntimeError, match=refused):
            differentiated(x)
        with pytest.raises(RuntimeError, match=refused):
            vmap(differentiated)(x[None])
    assert not function(x.requires_grad_()).requires_grad
    slope = torch.func.grad(lambda y: (function(y.detach()) * 2.0 + y.sum()).sum())(x.detach())
    torch.testing.assert_close(slope, torch.full_like(x, function(x).numel()))
    torch.testing.assert_close(vmap(function)(x.detach()[None])[0], function(x))


def test_what_has_no_gradient_is_refused_under_compiled_transforms() -> None:
    function, x = CONSTANTS["rewards: gae"]
    torch.compile(function, backend="aot_eager", fullgraph=True)(x.detach())
    for call in (torch.func.grad(lambda x: function(x).sum()), lambda x: jvp(function, (x,), (x,))):
        with pytest.raises(Exception, match="computed without gradient"):
            torch.compile(call, backend="aot_eager")(x.detach())


def test_a_denominator_has_no_gradient() -> None:
    denom = torch.tensor(3.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"^denom: carries no gradient"):
        klq_loss(CASE.old_logprobs, CASE.values, CASE.targets, mask=CASE.mask, denom=denom)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_incoming_gradients_at_once(dtype: torch.dtype) -> None:
    case = make_case(ragged_mask(3, 6), vocab=17, width=4, dtype=dtype)
    inputs = [t.detach().requires_grad_() for t in (case.hidden, case.weight, case.values)]
    incoming = torch.tensor([0.3003, -2.0])
    together = torch.autograd.grad(fused(*inputs, case), inputs, incoming, is_grads_batched=True)
    for k, scale in enumerate(incoming):
        alone = torch.autograd.grad(fused(*inputs, case), inputs, scale)
        for several, one in zip(together, alone, strict=True):
            torch.testing.assert_close(several[k], one)


def test_log_probabilities_have_no_second_derivative() -> None:
    hidden = CASE.hidden.detach().requires_grad_()
    (slope,) = torch.autograd.grad(logprobs(hidden), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.sum().backward()


@pytest.mark.parametrize("name", ["ref_logprobs", "rewards", "bootstrap_values", "trace"])
def test_what_makes_targets_is_constant(name: str) -> None:
    """A loss without trainable inputs does not require a gradient."""
    case = replace(CASE, **{name: getattr(CASE, name).detach().requires_grad_()})
    given = {n: getattr(case, n) for n in ("ref_logprobs", "rewards", "bootstrap_values", "trace", "mask")}
    constant = [t.detach() for t in (case.hidden, case.weight)]
    assert not fused_klq_loss(*constant, case.actions, case.values.detach(), **given).loss.requires_grad


def test_the_slope_by_decay_is_0_at_masked_tokens() -> None:
    """Also where the error beyond is infinite."""
    decay = torch.full((1, 4), 0.9, requires_grad=True)
    mask = torch.tensor([[True, True, False, True]])
    reverse_scan(torch.tensor([[1.0, 1.0, 1.0, float("inf")]]), decay, mask=mask)[0, 0].backward()
    assert decay.grad is not None
    assert decay.grad[0, 2] == 0


@pytest.mark.parametrize("made", [lambda: CASE.targets, lambda: pack(CASE.mask)], ids=["targets", "packing"])
def test_torch_save_and_load(made: Callable[[], Any]) -> None:
    saved, file = made(), io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    found = torch.load(file)  # weights only, as is its default
    assert type(found) is type(saved)
    for a, b in zip(found, saved, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_meta_tensors_have_shapes() -> None:
    """For planning memory on a machine without a GPU."""
    hidden, weight, actions = (t.to("meta") for t in (CASE.hidden, CASE.weight, CASE.actions))
    assert linear_logprobs(hidden, weight, actions).logprobs.shape == CASE.actions.shape
    targets = type(CASE.targets)(*(t.to("meta") for t in CASE.targets))
    loss = fused_klq_loss(hidden.requires_grad_(), weight, actions, CASE.values.to("meta"), targets=targets).loss
    loss.backward()
    assert loss.shape == ()
    assert hidden.grad is not None
