"""The operators under PyTorch's machinery: opcheck, torch.compile, checkpointing, saved-tensor hooks, CUDA graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, Outcome, assert_same_bits, differentiate, make_case, ragged_mask
from conftest import Place
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from watch import OPERATORS

from klq_kernels import (
    fused_klq_loss,
    gae,
    klq_loss,
    klq_targets,
    linear_kl,
    linear_logprobs,
    linear_select,
    reverse_scan,
)
from klq_kernels.call import layout
from klq_kernels.ops import fused_loss, scans
from klq_kernels.ops import klq_loss as loss_op
from klq_kernels.ops import linear_kl as kl_op
from klq_kernels.ops import linear_logprobs as logprobs_op
from klq_kernels.ops import linear_select as select_op
from klq_kernels.ops.operator import Operator

# ------------------------------------------------------------------------------------------------------------- opcheck


def flat(case: Case) -> Case:
    """The case's per-token tensors as the operators take them, flat; floating-point ones want gradients."""
    return case.packed(holes=True).map(lambda t: t.requires_grad_() if t.is_floating_point() else t)


def operator_calls(case: Case) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """{name: (operator, arguments)}: every operator, with and without its optional inputs."""
    c = flat(case)
    mask, ends = c.mask, c.cu_seqlens
    assert ends is not None
    rows, row_ends = layout.valid_rows(mask, ends, None, c.actions.numel())
    tail = torch.zeros(ends.numel() - 1, device=ends.device)
    discounts = (0.1, 0.9, 0.95)  # tau, gamma, lam
    whole: tuple[str, list[int]] = ("", [])  # no processes share it
    head = (c.hidden, c.weight, c.bias, *whole, c.actions)
    bare_head = (c.hidden, c.weight, None, *whole, c.actions)
    loss_head = (*head[:-1], *whole, c.actions)  # nor the results
    bare_loss_head = (*bare_head[:-1], *whole, c.actions)
    detached = (c.hidden.detach(), c.weight.detach(), c.bias.detach(), *whole, c.actions)
    shape = (0.1, 0.9, "double_clipped", 1.0, 0.2, 0.2)
    d = {n: getattr(c, n).detach() for n in ("old_logprobs", "old_values", "advantages", "ref_logprobs", "rewards")}
    old = (d["old_logprobs"], d["old_values"], d["advantages"])
    extra = (c.scores.detach(), c.bootstrap_values.detach(), c.trace.detach(), c.weights.detach())
    rollout = (d["old_logprobs"], d["ref_logprobs"], d["old_values"], d["rewards"], extra[2])
    bare_rollout = (None, None, d["old_values"], None, None)
    per_row = torch.randn(c.actions.shape, device=ends.device)
    denom = torch.tensor(7.0, device=ends.device)
    settings = (0.7, 9.0, False, True, None)
    dense, sampled = (0, None), (4, torch.tensor(3, device=ends.device))
    none3 = (None, None, None)
    reference = (c.hidden.detach().flip(-1), c.weight.detach().flip(0), c.bias.detach())
    heads = (c.hidden, c.weight, c.bias, *reference)
    bare_heads = (c.hidden, c.weight, None, *reference[:2], None)
    ids = torch.arange(2 * c.actions.numel(), device=ends.device).view(-1, 2) % c.weight.shape[0]
    select, per_pair = (c.hidden, c.weight, c.bias, ids), torch.rand(*ids.shape, 1, device=ends.device)
    return {
        "reverse_scan": (scans.reverse_scan, (c.rewards, c.trace, mask, ends)),
        "reverse_scan scalar": (scans.reverse_scan, (c.rewards, torch.full((1,), 0.9, device=ends.device), None, ends)),
        "lambda_errors": (scans.lambda_errors, (*rollout, tail, mask, ends, *discounts)),
        "lambda_errors gae": (scans.lambda_errors, (*bare_rollout, tail, None, ends, *discounts)),
        "klq_targets": (scans.klq_targets, (*rollout, tail, mask, ends, *discounts)),
        "klq_targets gae": (scans.klq_targets, (*bare_rollout, tail, None, ends, *discounts)),
        "linear_logprobs": (logprobs_op.linear_logprobs, (*head, mask, ends, None, *settings, *dense)),
        "linear_logprobs sampled": (
            logprobs_op.linear_logprobs, (*head, mask, ends, None, 0.7, 9.0, False, False, None, *sampled)
        ),
        "linear_logprobs bare": (
            logprobs_op.linear_logprobs, (*bare_head, None, row_ends, rows, 1.0, None, True, False, None, *dense)
        ),
        "linear_logprobs_backward": (
            logprobs_op.linear_logprobs_backward,
            (
                *detached, mask, ends, None, per_row + 9, per_row.abs(),
                per_row.abs(), None, per_row, per_row, per_row, 0.7, 9.0, False, None, *dense, True, True, True,
            ),
        ),
        "linear_logprobs_backward sampled": (
            logprobs_op.linear_logprobs_backward,
            (
                *detached, mask, ends, None, per_row + 9, per_row.abs(),
                None, -per_row.abs(), per_row, per_row, None, 0.7, 9.0, False, None, *sampled, True, True, True,
            ),
        ),
        "fused_klq_loss on-policy": (
            fused_loss.fused_klq_loss,
            (
                *loss_head, c.values, *none3, d["ref_logprobs"], None, *extra, mask, ends, None, denom, 0.9, 0.95,
                *shape, 0.7, 9.0, False, True, None, *dense, False, True, True, True, True,
            ),
        ),
        "fused_klq_loss sampled": (
            fused_loss.fused_klq_loss,
            (
                *loss_head, c.values, *none3, d["ref_logprobs"], None, *extra, mask, ends, None, denom, 0.9, 0.95,
                *shape, 0.7, 9.0, False, True, None, *sampled, False, True, True, True, True,
            ),
        ),
        "fused_klq_loss targets": (
            fused_loss.fused_klq_loss,
            (
                *bare_loss_head, c.values, *old, None, None, None, None, None, None, None, row_ends, rows, None, 1.0,
                1.0, *shape, 1.0, None, True, False, None, *dense, False, True, False, False, True,
            ),
        ),
        "linear_kl": (kl_op.linear_kl, (*heads, mask, ends, None, 0.7, 9.0, 1.0, None, False, False, None)),
        "linear_kl bare": (
            kl_op.linear_kl, (*bare_heads, None, row_ends, rows, 1.0, None, 1.0, None, True, True, None)
        ),
        "linear_kl_backward": (
            kl_op.linear_kl_backward,
            (
                *(None if t is None else t.detach() for t in heads), mask, ends, None, per_row.abs(), per_row + 9,
                per_row.abs(), per_row + 8, per_row.abs(), per_row, 0.7, 9.0, 1.0, None, False, False, None, True, True,
                True,
            ),
        ),
        "linear_select": (select_op.linear_select, (*select, mask, ends, None, 1, 0.7, 9.0)),
        "linear_select bare": (
            select_op.linear_select, (*select[:2], None, ids, None, row_ends, rows, 1, 1.0, None)
        ),
        "linear_select_backward": (
            select_op.linear_select_backward,
            (
                *(t.detach() for t in select), mask, ends, None, per_pair, per_pair - 1, 0.7, True, True, True
            ),
        ),
        "klq_loss": (loss_op.klq_loss, (c.ref_logprobs, c.values, *old, None, None, mask, ends, None, denom, *shape)),
    }  # fmt: skip


SMALL = {"vocab": 17, "width": 4}
CALLS = sorted(operator_calls(make_case(ragged_mask(3, 6), **SMALL)))


def test_every_operator_is_checked() -> None:
    calls = operator_calls(make_case(ragged_mask(3, 6), **SMALL))
    assert {getattr(op, "definition", op)._opoverload for op, _ in calls.values()} == OPERATORS.keys()


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(device: torch.device, call: str) -> None:
    """Schema, autograd registration, fake kernels, and tracing with dynamic shapes."""
    operator, arguments = operator_calls(make_case(ragged_mask(3, 6), device=device, **SMALL))[call]
    if isinstance(operator, Operator):
        operator, arguments = operator.definition, operator.packed(*arguments)
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("call", CALLS)
def test_fake_results_lie_as_the_real_ones(device: torch.device, call: str) -> None:
    """Compiled code relies on it, however the arguments lie."""

    def strided(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
            return value
        found = value.detach().mT.contiguous().mT if value.dim() > 1 else torch.stack([value.detach()] * 2, -1)[:, 0]
        return found.requires_grad_(value.requires_grad)

    operator, arguments = operator_calls(make_case(ragged_mask(3, 6), device=device, **SMALL))[call]
    arguments = tuple(map(strided, arguments))
    if isinstance(operator, Operator):
        operator, arguments = operator.definition, operator.packed(*arguments)
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    described = [
        [(t.dtype, t.device, t.shape, t.stride()) for t in (found if isinstance(found, tuple) else (found,))]
        for found in (real, fake)
    ]
    assert described[0] == described[1]


# ------------------------------------------------------------------------------------------------------- torch.compile


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


@pytest.mark.parametrize(
    ("layout", "on_policy", "dynamic"),
    [
        ("padded", True, False),
        ("padded", False, True),
        ("packed", True, True),
        ("packed with holes", False, False),
    ],
)
def test_compiled_loss_and_gradients(device: torch.device, layout: str, on_policy: bool, dynamic: bool) -> None:
    function = compiled(fused_klq_loss, dynamic=dynamic)
    for shape in ((3, 6), (4, 9)) if dynamic else ((3, 6),):
        case = make_case(ragged_mask(*shape), device=device, **SMALL)
        if layout != "padded":
            case = case.packed(holes="holes" in layout)
        arguments = case.loss_arguments(on_policy=on_policy, weights=True, trace=on_policy, bootstrap=on_policy)
        eager, traced = (
            differentiate(f, case, return_entropy=True, softcap=9.0, **arguments) for f in (fused_klq_loss, function)
        )
        assert_same_bits(eager, traced)


def test_new_shapes_do_not_recompile_each_time(device: torch.device) -> None:
    """The first change of shape makes it a symbol; no check or message may pin it to a number again."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(fused_klq_loss, fullgraph=True, backend=counter)
    for step in range(5):
        case = make_case(ragged_mask(3 + step, 6 + 2 * step), device=device, **SMALL)
        differentiate(function, case, **case.loss_arguments(on_policy=True))
    assert counter.frame_count == 2


def test_compiled_step_around_the_loss(device: torch.device) -> None:
    """The loss in the middle of a graph: gradients flow on into the network that made hidden states and values."""
    case = make_case(ragged_mask(3, 6), device=device, **SMALL)
    torch.manual_seed(0)
    body = torch.nn.Linear(4, 4).to(device)
    critic = torch.nn.Linear(4, 1).to(device)
    head = torch.nn.Parameter(case.weight.clone())
    parameters = [*body.parameters(), *critic.parameters(), head]

    def step(x: Tensor, actions: Tensor, mask: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
        hidden = torch.tanh(body(x))
        values = critic(hidden).squeeze(-1)
        loss = fused_klq_loss(hidden, head, actions, values, ref_logprobs=ref, rewards=rewards, mask=mask).loss
        return 2 * loss + linear_logprobs(hidden, head, actions, mask=mask, return_entropy=True).entropy.mean()

    arguments = (case.hidden, case.actions, case.mask, case.ref_logprobs, case.scores)
    gradients = [torch.autograd.grad(f(*arguments), parameters) for f in (step, compiled(step))]
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, traced)
        assert eager.ne(0).any()


def test_compiled_graph_kept_for_a_second_backward(device: torch.device) -> None:
    """Tracing must not bake in the scaling in place that a plain backward may do."""
    case = make_case(ragged_mask(3, 6), device=device, **SMALL)
    hidden = case.hidden.clone().requires_grad_()
    function = compiled(fused_klq_loss)
    loss = function(hidden, case.weight, case.actions, case.values, **case.loss_arguments(on_policy=True)).loss
    scaled = 3 * loss
    first = torch.autograd.grad(scaled, hidden, retain_graph=True)[0].clone()
    second = torch.autograd.grad(scaled, hidden)[0]
    assert torch.equal(first, second)
    assert first.ne(0).any()


def test_compiled_scans_and_targets(device: torch.device) -> None:
    case = make_case(ragged_mask(4, 9), device=device, **SMALL)

    def everything(logp: Tensor, ref: Tensor, values: Tensor, rewards: Tensor, decay: Tensor, mask: Tensor) -> Any:
        targets = klq_targets(logp, ref, values, rewards, mask=mask)
        return (
            *targets,
            gae(rewards, values, mask=mask),
            klq_loss(logp, values, targets, mask=mask).loss,
            reverse_scan(rewards, decay, mask=mask),
            reverse_scan(rewards, 0.9, mask=mask),
        )

    arguments = (case.old_logprobs, case.ref_logprobs, case.old_values, case.rewards, case.trace, case.mask)
    for eager, traced in zip(everything(*arguments), compiled(everything)(*arguments), strict=True):
        assert torch.equal(eager, traced)
    decay = case.trace.clone().requires_grad_()
    outs = [f(*arguments[:4], decay, case.mask)[-2].square().sum() for f in (everything, compiled(everything))]
    gradients = [torch.autograd.grad(out, decay)[0] for out in outs]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("seed", [None, 5, torch.tensor(5)], ids=str)
def test_compiled_sampled_gradient(device: torch.device, seed: Any) -> None:
    """A seed that is drawn follows torch's generator, traced as it is eager."""
    case = make_case(ragged_mask(3, 6), device=device, **SMALL)
    arguments = {**case.loss_arguments(on_policy=True), "gradient": "sampled", "samples": 4, "seed": seed}
    found = []
    for function in (fused_klq_loss, compiled(fused_klq_loss)):
        torch.manual_seed(11)
        found.append(differentiate(function, case, **arguments))
    assert_same_bits(*found)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile's default backend needs a C++ compiler")
def test_compiled_by_inductor(device: torch.device) -> None:
    case = make_case(ragged_mask(3, 6), device=device, **SMALL)
    function = compiled(fused_klq_loss, backend="inductor")
    arguments = case.loss_arguments(on_policy=True)
    eager, traced = (differentiate(f, case, **arguments) for f in (fused_klq_loss, function))
    for name, tensor in eager.tensors().items():
        torch.testing.assert_close(tensor, traced.tensors()[name])


# ---------------------------------------------------------------------------------------------------- autograd's tools


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(device: torch.device, reentrant: bool) -> None:
    case = make_case(ragged_mask(3, 6), device=device, **SMALL)
    arguments = case.loss_arguments(on_policy=True)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if reentrant:  # takes no keywords and returns tensors alone
            tensors = checkpoint(lambda *a: fused_klq_loss(*a, **kwargs).loss, *args, use_reentrant=True)
            return tensors, {}
        return checkpoint(fused_klq_loss, *args, use_reentrant=False, **kwargs)

    direct, got = (differentiate(f, case, **arguments) for f in (fused_klq_loss, checkpointed))
    assert_same_bits(Outcome(direct.loss, got.metrics and direct.metrics, direct.gradients), got)


def test_saved_tensor_hooks(device: torch.device) -> None:
    """Offloading what backward needs, and handing it back as a copy, changes nothing."""
    case = make_case(ragged_mask(3, 6), device=device, **SMALL)
    arguments = case.loss_arguments(on_policy=True)
    direct = differentiate(fused_klq_loss, case, **arguments)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu().clone(), lambda t: t.to(device)):
        assert_same_bits(direct, differentiate(fused_klq_loss, case, **arguments))


def test_inference_mode(device: torch.device) -> None:
    case = make_case(ragged_mask(3, 6), device=device, **SMALL)
    arguments = case.loss_arguments(on_policy=True)
    direct = fused_klq_loss(case.hidden, case.weight, case.actions, case.values, **arguments)
    with torch.inference_mode():
        inside = fused_klq_loss(case.hidden, case.weight, case.actions, case.values, **arguments)
        logprobs = linear_logprobs(case.hidden, case.weight, case.actions, **case.layout)
    assert torch.equal(direct.loss, inside.loss)
    assert torch.equal(logprobs.logprobs, linear_logprobs(case.hidden, case.weight, case.actions, **case.layout)[0])


# ----------------------------------------------------------------------------------------------------------- GPU only


def packed_step(device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """A whole update on packed tokens without a mask: targets, loss, divergence, a few logits, gradients."""
    case = make_case(ragged_mask(5, 24), vocab=1009, width=64, dtype=torch.bfloat16, device=device).packed()
    hidden, weight, values = (getattr(case, n).clone().requires_grad_() for n in ("hidden", "weight", "values"))
    denom = torch.tensor(float(case.actions.numel()), device=hidden.device)
    ids = torch.stack([case.actions, case.actions // 2], -1)

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            old = linear_logprobs(hidden, weight, case.actions, cu_seqlens=case.cu_seqlens).logprobs
        targets = klq_targets(old, case.ref_logprobs, values, case.scores, cu_seqlens=case.cu_seqlens)
        keywords = {"cu_seqlens": case.cu_seqlens, "denom": denom}
        loss = fused_klq_loss(hidden, weight, case.actions, values, targets=targets, **keywords).loss
        other = fused_klq_loss(
            hidden, weight, case.actions, values, ref_logprobs=case.ref_logprobs, rewards=case.scores, **keywords
        ).loss
        ref = (hidden.detach().flip(0), weight.detach())
        kl = linear_kl(hidden, weight, *ref, cu_seqlens=case.cu_seqlens).mean()
        few = linear_select(hidden, weight, ids, softcap=9.0).square().mean()
        total = loss + other + kl + few
        return (loss.detach(), kl.detach(), few.detach(), *torch.autograd.grad(total, (hidden, weight, values)))

    return step


@pytest.fixture
def triton_place(place: Place) -> Place:
    if place.backend != "triton":
        pytest.skip("only the Triton kernels promise to work without a synchronisation")
    return place


@pytest.mark.gpu
def test_packed_tokens_need_no_synchronisation(triton_place: Place) -> None:
    step = packed_step(triton_place.device)
    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_packed_tokens_in_a_cuda_graph(triton_place: Place) -> None:
    step = packed_step(triton_place.device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))


def test_compiled_sampled_gradient_of_hidden_states_in_another_order(device: torch.device) -> None:
    """Gradients come out contiguous, as the fake kernels say, however the hidden states lie."""
    case = make_case(ragged_mask(3, 6), device=device).packed(holes=True)
    hidden = case.hidden.detach().T.contiguous().T.requires_grad_()
    assert not hidden.is_contiguous()

    def step(x: Tensor) -> Tensor:
        found = linear_logprobs(
            x, case.weight, case.actions, mask=case.mask, cu_seqlens=case.cu_seqlens, gradient="sampled", seed=1
        )
        return found.logprobs.sum()

    gradients = [
        torch.autograd.grad(run(hidden), hidden)[0] for run in (step, torch.compile(step, backend="aot_eager"))
    ]
    torch.testing.assert_close(*gradients)
