"""Functions that a rank runs in tests of heads and of sequences that are split over processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from cases import Case, Outcome, differentiate, make_case, ragged_mask
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from watch import Watch

from klq_kernels import fused_klq_loss, linear_logprobs, reverse_scan
from klq_kernels import klq_targets as targets_of


def rows_of(group: dist.ProcessGroup, sizes: list[int]) -> slice:
    """This rank's rows of a head."""
    first = sum(sizes[: group.rank()])
    return slice(first, first + sizes[group.rank()])


def shard_of(group: dist.ProcessGroup, case: Case, sizes: list[int]) -> Case:
    rows = rows_of(group, sizes)
    return replace(case, weight=case.weight[rows], bias=case.bias[rows])


def loss(group: dist.ProcessGroup, case: Case, sizes: list[int], options: dict[str, Any]) -> Outcome:
    return differentiate(fused_klq_loss, shard_of(group, case, sizes), process_group=group, **options)


def logprobs(
    group: dist.ProcessGroup | None, case: Case, by: tuple[Tensor, Tensor, Tensor | None], options: dict[str, Any]
) -> dict[str, Tensor]:
    """The outputs and the gradients of the head, given those by log-probabilities, log-normalisers and entropies."""
    leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    hidden, weight, bias = leaves
    found = linear_logprobs(hidden, weight, case.actions, bias=bias, process_group=group, **case.layout, **options)
    outputs = [t for t in found if t is not None]
    gradients = torch.autograd.grad(outputs, leaves, [g for g in by if g is not None])
    names = ("logprobs", "logsumexp", "entropy", "hidden", "weight", "bias")
    values = [*(None if t is None else t.detach() for t in found), *gradients]
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def sharded_logprobs(
    group: dist.ProcessGroup, case: Case, sizes: list[int], by: Any, options: dict[str, Any]
) -> dict[str, Tensor]:
    return logprobs(group, shard_of(group, case, sizes), by, options)


def span_of(group: dist.ProcessGroup, cuts: list[int]) -> slice:
    """This rank's part of the time, which is cut at these places."""
    edges = [0, *cuts]
    return slice(edges[group.rank()], edges[group.rank() + 1])


def scan(group: dist.ProcessGroup, cuts: list[int], inputs: dict[str, Tensor], by: Tensor) -> dict[str, Tensor]:
    """``reverse_scan`` and its gradients, on this rank's span."""
    span = span_of(group, cuts)
    delta, decay = (inputs[name][:, span].clone().requires_grad_() for name in ("delta", "decay"))
    found = reverse_scan(delta, decay, mask=inputs["mask"][:, span].contiguous(), process_group=group)
    d_delta, d_decay = torch.autograd.grad(found, [delta, decay], by[:, span])
    return {"found": found.detach(), "delta": d_delta, "decay": d_decay}


def targets(group: dist.ProcessGroup, cuts: list[int], case: Case, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """``klq_targets`` on this rank's span; options of one number per token are cut, those of one per sequence not."""
    span = span_of(group, cuts)

    def cut(value: Any) -> Any:
        return value[:, span].contiguous() if isinstance(value, Tensor) and value.dim() == 2 else value

    columns = [cut(t) for t in (case.old_logprobs, case.ref_logprobs, case.values)]
    return tuple(targets_of(*columns, **{k: cut(v) for k, v in options.items()}, process_group=group))


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """Inside, the library's collectives as they are called: (name, bytes that this rank gives or gets)."""
    calls: list[tuple[str, int]] = []

    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    shipped = {name: getattr(dist, name) for name in (gather, "all_reduce")}

    def counting(name: str) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(("all_gather" if name == gather else name, tensor.nbytes))
            return shipped[name](tensor, *args, **kwargs)

        return patch.object(dist, name, call)

    with counting(gather), counting("all_reduce"):
        yield calls


def loss_of_spans(group: dist.ProcessGroup, cuts: list[int], case: Case, options: dict[str, Any]) -> Outcome:
    """The on-policy loss of this rank's span of time."""
    span = span_of(group, cuts)

    def cut(value: Any) -> Any:
        return value[:, span].contiguous() if isinstance(value, Tensor) and value.dim() == 2 else value

    hidden = case.hidden[:, span].detach().clone().requires_grad_()
    values = case.values[:, span].detach().clone().requires_grad_()
    weight, bias = (t.detach().clone().requires_grad_() for t in (case.weight, case.bias))
    told = {name: cut(value) for name, value in options.items()}
    found = fused_klq_loss(
        hidden, weight, case.actions[:, span].contiguous(), values, bias=bias, time_group=group, **told
    )
    found.loss.backward()
    gradients = {"hidden": hidden.grad, "values": values.grad, "weight": weight.grad, "bias": bias.grad}
    return Outcome(found.loss.detach(), found.metrics, gradients)


def counted(group: dist.ProcessGroup, case: Case, sizes: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """The collectives of a loss."""
    with collectives() as calls:
        outcome = loss(group, case, sizes, options)
    return {"calls": calls, "outcome": outcome}


def refusal(group: dist.ProcessGroup, case: Case, sizes: list[int], change: dict[str, Any]) -> str:
    """The message of the ValueError, where rank 1 makes its call with a change of arguments."""
    options: dict[str, Any] = {**case.loss_arguments(on_policy=False), "denom": 7.0}
    if group.rank() == 1:
        fields_of_case = {k: v for k, v in change.items() if k in ("actions", "mask", "values")}
        case = replace(case, **fields_of_case)
        options |= {k: v for k, v in change.items() if k not in fields_of_case}
        options |= {"targets": case.targets, **case.layout}
    try:
        loss(group, case, sizes, options)
    except ValueError as error:
        return str(error)
    return "no error"


def sequences_of(group: dist.ProcessGroup, case: Case, counts: list[int]) -> Case:
    """This rank's sequences of a padded batch."""
    first = sum(counts[: group.rank()])
    mine = slice(first, first + counts[group.rank()])
    batch = case.actions.shape[0]
    cut = {
        f.name: getattr(case, f.name)[mine]
        for f in fields(case)
        if f.name not in ("weight", "bias") and getattr(case, f.name) is not None
        and getattr(case, f.name).shape[0] == batch
    }  # fmt: skip
    return replace(case, **cut)


def loss_of_a_head_split_twice(group: dist.ProcessGroup, case: Case, counts: list[int], on_policy: bool) -> Outcome:
    """Four ranks: two of tensor parallelism have the same sequences, FSDP2 splits the rows of each once more."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    tensor_parallel = mesh["tp"]

    def split(whole: Tensor) -> DTensor:
        head = nn.Module()
        head.weight = nn.Parameter(distribute_tensor(whole.detach().clone(), tensor_parallel, [Shard(0)]))
        fully_shard(head, mesh=mesh["fsdp"])
        return head.weight

    weight, bias = split(case.weight), split(case.bias)
    own = sequences_of(mesh["fsdp"].get_group(), case, counts)
    own = replace(own, mask=None if own.mask is None else own.mask.contiguous())
    hidden, values = (t.detach().clone().requires_grad_() for t in (own.hidden, own.values))
    options = own.loss_arguments(on_policy=on_policy)
    found = fused_klq_loss(hidden, weight, own.actions, values, bias=bias, process_group=tensor_parallel, **options)
    scored = linear_logprobs(hidden, weight, own.actions, bias=bias, process_group=tensor_parallel, mask=own.mask)
    (found.loss + scored.logprobs.sum()).backward()
    assert weight.grad.placements == weight.placements
    whole = {"weight": weight.grad.full_tensor(), "bias": bias.grad.full_tensor()}
    return Outcome(found.loss.detach(), found.metrics, {"hidden": hidden.grad, "values": values.grad, **whole})


def refusal_of_spans_beyond_the_head(group: dist.ProcessGroup, case: Case) -> str:
    """The message, where the head is split over other ranks than time is."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("head", "time"))
    head = mesh["head"]
    weight, bias = (distribute_tensor(t.clone(), head, [Shard(0)]).requires_grad_() for t in (case.weight, case.bias))
    options = {"rewards": case.rewards, "ref_logprobs": case.ref_logprobs, "mask": case.mask}
    hidden, values = case.hidden.detach(), case.values.detach()
    try:
        fused_klq_loss(hidden, weight, case.actions, values, bias=bias, time_group=mesh["time"], **options)
    except ValueError as error:
        return str(error)
    return "no error"


def counted_own_tokens(
    group: dist.ProcessGroup, case: Case, counts: list[int], sizes: list[int], move: str | None
) -> dict[str, int]:
    """Bytes that each kind of collective moves in a loss and its backward, tokens apart."""
    moved: dict[str, int] = {}
    with ExitStack() as stack:
        for kind in ("all_gather", "all_reduce", "reduce_scatter"):
            name = next(
                n for n in (f"{kind}_single", f"{kind}_into_tensor", f"{kind}_tensor", kind) if hasattr(dist, n)
            )
            shipped = getattr(dist, name)

            def call(out: Tensor, *args: Any, _kind: str = kind, _shipped: Any = shipped, **kwargs: Any) -> Any:
                given = args[0] if _kind == "reduce_scatter" else out
                moved[_kind] = moved.get(_kind, 0) + given.nbytes
                return _shipped(out, *args, **kwargs)

            stack.enter_context(patch.object(dist, name, call))
        loss_of_own_tokens(group, case, counts, sizes, {"on_policy": False, "sharding": move})
    return moved


def refusal_of_a_token(group: dist.ProcessGroup, case: Case) -> str:
    """The message, where rank 1 has a token outside the vocabulary and the head moves."""
    if group.rank() == 1:
        case = replace(case, actions=torch.full_like(case.actions, 131))
    try:
        loss_of_own_tokens(group, case, [2, 2], [70, 61], {"on_policy": False, "sharding": "head"})
    except ValueError as error:
        return str(error)
    return "no error"


def refusal_of_own_tokens(group: dist.ProcessGroup, case: Case) -> str:
    """The message, where rank 1 passes rewards per sequence and rank 0 per token."""
    settings = {"on_policy": True, "scores": group.rank() == 1}
    try:
        loss_of_own_tokens(group, case, [2, 2], [70, 61], settings)
    except ValueError as error:
        return str(error)
    return "no error"


def as_dtensor(group: dist.ProcessGroup, rows: Tensor, whole: Tensor) -> DTensor:
    mesh = DeviceMesh.from_group(group, "cpu")
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def loss_of_own_tokens(
    group: dist.ProcessGroup, case: Case, counts: list[int], sizes: list[int], settings: dict[str, Any]
) -> Outcome:
    """``fused_klq_loss`` on this rank's sequences, with a head of DTensors; gradients of this rank's part."""
    own, rows = sequences_of(group, case, counts), rows_of(group, sizes)
    own = replace(own, mask=None if own.mask is None else own.mask.contiguous())
    weight, bias = (as_dtensor(group, t[rows].clone(), t).requires_grad_() for t in (case.weight, case.bias))
    hidden, values = (t.detach().clone().requires_grad_() for t in (own.hidden, own.values))
    which = {name: settings[name] for name in ("on_policy", "scores", "bootstrap", "trace") if name in settings}
    options = {name: value for name, value in settings.items() if name not in which}
    found = fused_klq_loss(hidden, weight, own.actions, values, bias=bias, **own.loss_arguments(**which), **options)
    found.loss.backward()
    assert isinstance(weight.grad, DTensor)
    assert weight.grad.placements == weight.placements
    gradients = {
        "hidden": hidden.grad, "values": values.grad, "weight": weight.grad.to_local(), "bias": bias.grad.to_local()
    }  # fmt: skip
    return Outcome(found.loss.detach(), found.metrics, gradients)


def loss_of_split_states(
    group: dist.ProcessGroup, case: Case, sizes: list[int], split: str, whole_head: bool, options: dict[str, Any]
) -> Outcome:
    """Sequence parallel: the same tokens on all ranks, their hidden states a DTensor on the ranks of the head."""
    rows, mesh = rows_of(group, sizes), DeviceMesh.from_group(group, "cpu")
    placement = {"tokens": Shard(0), "time": Shard(1), "copies": Replicate()}[split]
    hidden = distribute_tensor(case.hidden.clone(), mesh, [placement]).requires_grad_()
    values = case.values.clone().requires_grad_()
    weight, bias = (t[rows].clone() for t in (case.weight, case.bias))
    if whole_head:
        weight, bias = as_dtensor(group, weight, case.weight), as_dtensor(group, bias, case.bias)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    found = fused_klq_loss(
        hidden, weight, case.actions, values, bias=bias, process_group=None if whole_head else group, **options
    )
    found.loss.backward()
    assert isinstance(hidden.grad, DTensor)
    assert hidden.grad.placements == hidden.placements
    gradients = dict(zip(("weight", "bias"), (leaf.grad for leaf in leaves), strict=True))
    gradients = {n: g.to_local() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    whole = {"hidden": hidden.grad.full_tensor(), "values": values.grad}
    return Outcome(found.loss.detach(), found.metrics, {**whole, **gradients})


def logprobs_with_copies(group: dist.ProcessGroup, case: Case, counts: list[int], by: Tensor) -> Tensor:
    """The gradient by a weight of which every rank has a copy, each with sequences of its own."""
    own = sequences_of(group, replace(case, rewards=by), counts)
    weight = DTensor.from_local(
        case.weight.clone(), DeviceMesh.from_group(group, "cpu"), [Replicate()], run_check=False
    )
    found = linear_logprobs(own.hidden, weight.requires_grad_(), own.actions, mask=own.valid.contiguous())
    (found.logprobs * own.rewards).sum().backward()
    assert isinstance(weight.grad, DTensor)
    return weight.grad.to_local()


def logprobs_of_own_tokens(
    group: dist.ProcessGroup, case: Case, counts: list[int], sizes: list[int], by: Tensor, move: str | None
) -> dict[str, Tensor]:
    own, rows = sequences_of(group, replace(case, rewards=by), counts), rows_of(group, sizes)
    weight = as_dtensor(group, case.weight[rows].clone(), case.weight).requires_grad_()
    hidden = own.hidden.detach().clone().requires_grad_()
    mask = None if own.mask is None else own.mask.contiguous()
    found = linear_logprobs(hidden, weight, own.actions, mask=mask, return_entropy=True, sharding=move)
    assert found.entropy is not None
    (found.logprobs * own.rewards + found.entropy).sum().backward()
    assert weight.grad is not None
    return {
        "logprobs": found.logprobs.detach(), "entropy": found.entropy.detach(), "hidden": hidden.grad,
        "weight": weight.grad.to_local(),
    }  # fmt: skip


def fails(group: dist.ProcessGroup, how: str) -> None:
    """A loss in which rank 1 raises beforehand, dies beforehand, or dies between two collectives of the call."""
    case = make_case(ragged_mask(4, 8))
    if group.rank() == 1:
        if how == "raises":
            raise KeyError("a rank's own affair")
        if how == "dies":
            os._exit(1)
        with patch.object(dist, "all_reduce", lambda *_, **__: os._exit(1)):
            loss(group, case, [70, 61], case.loss_arguments(on_policy=False))
    loss(group, case, [70, 61], case.loss_arguments(on_policy=False))


def largest_allocation(group: dist.ProcessGroup, case: Case, counts: list[int], sizes: list[int]) -> int:
    """Bytes of the largest tensor made in a loss, forward and backward, with a head of DTensors."""
    with Watch() as watch:
        loss_of_own_tokens(group, case, counts, sizes, {"on_policy": False})
    return watch.largest()


def refused_placement(group: dist.ProcessGroup) -> str:
    weight = DTensor.from_local(torch.randn(5, 4), DeviceMesh.from_group(group, "cpu"), [Shard(1)], run_check=False)
    try:
        linear_logprobs(torch.randn(1, 2, 4), weight, torch.zeros(1, 2, dtype=torch.long))
    except ValueError as error:
        return str(error)
    return "no error"


class Model(nn.Module):
    """A trunk, and a head that is never called: its weight is read."""

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.head = nn.Linear(width, vocab, bias=False)


def model_for(case: Case) -> Model:
    torch.manual_seed(0)
    return Model(case.hidden.shape[-1], case.weight.shape[0])


def step(model: Model, case: Case, denom: float) -> None:
    """One clipped step of AdamW, twice."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        loss = fused_klq_loss(
            model.trunk(case.hidden), model.head.weight, case.actions, case.values, denom=denom,
            **case.loss_arguments(on_policy=False),
        ).loss  # fmt: skip
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()


def fsdp2(group: dist.ProcessGroup, case: Case, counts: list[int], hybrid: bool) -> dict[str, Tensor]:
    """The model after two steps, sharded by FSDP2 over ranks with sequences of their own.

    ``hybrid``: over two of four ranks, of which the other two have a copy.
    """
    mesh = DeviceMesh.from_group(group, "cpu")
    if hybrid:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "rows"))
    model = model_for(case)
    for part in (model.trunk, model.head):
        fully_shard(part, mesh=mesh)
    tokens = float(case.valid.sum())
    own = sequences_of(group, case, counts)
    step(model, replace(own, mask=own.valid.contiguous()), tokens / group.size())
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}
