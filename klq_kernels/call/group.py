"""Processes that share one call: the check that all of them make the same one, before any of them waits for another."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..vocabulary.collectives import add_up, all_gather
from .checks import require

# ``full_tensor()`` alone takes the gradients of all ranks for equal ones and keeps its own share of its own.
GATHER = (
    "or pass weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim), with Partial from "
    "torch.distributed.tensor, which adds up the gradients of all ranks (each with other tokens)"
)


def group_of(process_group: object, name: str = "process_group") -> dist.ProcessGroup | None:
    """The group behind the argument; None for None and for a group of one process, which need no communication.

    Raises:
        ValueError: where it is no process group, or one that this process is not in.
    """
    if process_group is None:
        return None
    group: Any = process_group
    if hasattr(group, "get_group"):  # a DeviceMesh
        require(group.ndim == 1, name, f"must have one dimension, got a mesh of {group.ndim}")
        group = group.get_group()
    known = isinstance(group, dist.ProcessGroup)
    require(known, name, f"must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    return group if group.size() > 1 else None


def agree(
    group: dist.ProcessGroup,
    device: torch.device,
    settings: dict[str, Any],
    own: tuple[int, ...] = (),
    given: tuple[Tensor | None, ...] = (),
) -> list[list[int]]:
    """Compares the ranks' calls in one all-gather of a few integers, and returns every rank's ``own``.

    Args:
        settings: what all ranks must pass alike, of values whose ``repr`` says what they are.
        own: numbers of this rank.
        given: int64, int32 or boolean tensors that all ranks must pass alike; compared by a checksum.

    Raises:
        ValueError: on all ranks, where two calls differ.
    """
    compiling = torch.compiler.is_compiling()
    require(not compiling, "process_group", "torch.compile cannot trace what processes share; leave the call out of it")
    said = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    numbers = torch.tensor([zlib.crc32(said.encode()), *own], dtype=torch.int64).to(device)
    sums = [_checksum(tensor).to(device) for tensor in given if tensor is not None]
    total = sum(sums, torch.zeros((), dtype=torch.int64, device=device))
    mine = torch.cat([total.reshape(1), numbers])
    table = all_gather(mine, group).tolist()
    for rank, (checksum, settled, *_) in enumerate(table):
        other = f"rank {rank} was called with other arguments than rank 0; here they are {said}"
        require(settled == table[0][1], "process_group", other)
        other = f"rank {rank} has other tokens than rank 0 (actions, mask, cu_seqlens, packing), or another denom"
        require(checksum == table[0][0], "process_group", other)
    return [row[2:] for row in table]


class SplitHead(NamedTuple):
    """This rank's rows of a head, and the group that has the others; None where the head is whole."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    group: dist.ProcessGroup | None
    apart: dist.ProcessGroup | None  # the ranks that have other tokens, and other parts of these rows
    vocab: int  # of all ranks together, where that is known without asking them; else 0

    @property
    def split(self) -> bool:
        """Whether other ranks have rows too, so that this one may have none."""
        return self.group is not None or self.apart is not None


def split_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, process_group: object, sharding: str | None = None
) -> SplitHead:
    """The rows that a call is about: given beside a group, or those of a DTensor.

    Hidden states that are a DTensor on the same ranks say that all have the same tokens. They come whole from it,
    however it has split them (sequence parallel), and their gradient is split alike.

    A DTensor may also lie in copies on further dimensions of its mesh (HSDP, or copies alone), each with tokens of its
    own: the gradient is the mean over them. Where two dimensions split it by rows, FSDP2 has split the rows of tensor
    parallelism once more; ``process_group`` says then which ranks have the same tokens, and the rows of those come
    whole to each rank.

    Raises:
        ValueError: where a DTensor is split in another way than by rows, or a group is given beside one that is split
            once; or ``sharding`` is no known way, or one that the split does not have.
    """
    require(sharding in (None, "tokens", "head"), "sharding", f"must be tokens, head or None; got {sharding!r}")
    group = group_of(process_group)
    if not _is_dtensor(weight):
        require(sharding is None, "sharding", "says what moves where the weight is a DTensor; leave it out")
        return SplitHead(_whole(hidden, group), weight, bias, group, None, 0)
    split: Any = weight  # importing DTensor's module would take longer than the rest of the library
    mesh, placements = split.device_mesh, split.placements
    copied = [dim for dim, placement in enumerate(placements) if placement.is_replicate()]
    whole = [dim for dim in range(mesh.ndim) if mesh.size(dim) == 1]
    by_rows = [dim for dim, p in enumerate(placements) if dim not in whole and _splits_rows(p)]
    known = len(by_rows) <= 2 and len({*by_rows, *copied, *whole}) == len(placements)
    wanted = "must be split by Shard(0) over one dimension of its mesh, or none, and lie in copies on the others"
    require(known, "weight", f"is a DTensor with placements {list(placements)}, and {wanted}; {GATHER}")
    given_bias: Any = bias
    alike = _is_dtensor(bias) and (given_bias.device_mesh, given_bias.placements) == (mesh, placements)
    require(bias is None or alike, "bias", "must be a DTensor with the weight's mesh and placements")
    copies = [mesh.get_group(dim) for dim in copied if mesh.size(dim) > 1]

    def own(tensor: Any) -> Tensor:
        return _Averaged.apply(tensor.to_local(), copies) if copies else tensor.to_local()

    rows, own_bias, vocab = own(weight), None if bias is None else own(bias), int(split.shape[0])
    if len(by_rows) == 2:
        apart = _apart(split, by_rows, group)
        require(sharding != "tokens", "sharding", "must be head where tensor parallelism has split the weight as well")
        return SplitHead(_whole(hidden, group), rows, own_bias, group, apart, vocab)
    require(group is None, "process_group", "a weight that is a DTensor brings its own; leave it out")
    ranks = mesh.get_group(by_rows[0]) if by_rows else None
    if _is_dtensor(hidden):
        return SplitHead(_whole(hidden, ranks), rows, own_bias, ranks, None, vocab)
    return SplitHead(hidden, rows, own_bias, None, ranks, vocab)


def check_spans(spans: dist.ProcessGroup, apart: dist.ProcessGroup) -> None:
    """Raises a ValueError unless all ranks of ``spans`` are among those that share a head, each with its own tokens:
    the loss is that of the tokens of those.
    """
    shared = set(dist.get_process_group_ranks(apart))
    inside = shared.issuperset(dist.get_process_group_ranks(spans))
    ranks = f"must be of the ranks over which the weight is split by rows, {sorted(shared)}"
    require(inside, "time_group", f"{ranks}: the loss is that of their tokens, and of all spans")


def _splits_rows(placement: Any) -> bool:
    """Whether it is Shard(0), also one that splits what another dimension has split (FSDP2 of tensor parallel)."""
    return bool(placement.is_shard(0)) or (hasattr(placement, "split_factor") and placement.dim == 0)


def _apart(split: Any, by_rows: list[int], group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The ranks with other tokens, of a weight that is split by rows twice and beside which a group was given."""
    mesh = split.device_mesh
    ranks = None if group is None else dist.get_process_group_ranks(group)
    same = [dim for dim in by_rows if dist.get_process_group_ranks(mesh.get_group(dim)) == ranks]
    require(
        len(same) == 1,
        "process_group",
        "must be the ranks that have the same tokens (tensor parallel), where the weight is a DTensor split by rows "
        "over two dimensions of its mesh",
    )
    (other,) = set(by_rows) - set(same)
    nested = getattr(split.placements[other], "split_factor", 1) == mesh.size(same[0])
    require(
        nested,
        "weight",
        f"is a DTensor with placements {list(split.placements)}: tensor parallelism must have split it first, and "
        "FSDP2 then, as fully_shard does",
    )
    found: dist.ProcessGroup = mesh.get_group(other)
    return found


class _Averaged(torch.autograd.Function):
    """The tensor as it is; its gradient is the mean over the ranks of these groups, which have copies of it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, groups: list[dist.ProcessGroup]) -> Tensor:
        ctx.groups = groups
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None]:
        total = by.clone()
        for group in ctx.groups:
            add_up(total, group).wait()
            total /= group.size()
        return total, None


def _is_dtensor(tensor: object) -> bool:
    return hasattr(tensor, "placements")


def _whole(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Hidden states of all tokens, of which this rank may have had a part."""
    if not _is_dtensor(hidden):
        return hidden
    split: Any = hidden
    mesh = split.device_mesh
    shared = mesh.ndim == 1 and (mesh.size() == 1 or mesh.get_group() == group)
    require(shared, "hidden", "is a DTensor, and may be one only on the ranks that share the head")
    whole: Tensor = split.full_tensor()
    return whole


class Shards(NamedTuple):
    """How an operator is told of the ranks that share a head."""

    group: str  # the name by which PyTorch finds it, "" for none
    shard_sizes: list[int]  # how many rows of the head each rank has


def share_head(group: dist.ProcessGroup | None, arguments: dict[str, Any], settings: dict[str, Any]) -> Shards:
    """The rows of the head on each rank, once all ranks agree on everything else.

    Args:
        arguments: an operator's, flat: the head, the tokens and where the valid ones are.
        settings: the caller's other arguments that all ranks must pass alike.
    """
    if group is None:
        return Shards("", [])
    hidden, weight, bias, actions = (arguments[name] for name in ("hidden", "weight", "bias", "actions"))
    mask, cu_seqlens, rows = (arguments[name] for name in ("mask", "cu_seqlens", "rows"))
    alike = {
        "hidden": tuple(hidden.shape),
        "given": dtypes_of(arguments),
        "requires_grad": (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad),
        "fp32_logits": arguments["fp32_logits"],
        "samples": arguments["samples"],
    }
    taken = actions if mask is None else torch.where(mask, actions, 0)
    taken = taken if rows is None else taken[rows]
    given = (taken, mask, cu_seqlens, rows, bits_of(arguments.get("denom")))
    sizes = [rows for (rows,) in agree(group, cu_seqlens.device, alike | settings, (weight.shape[0],), given)]
    require(sum(sizes) > 0, "weight", "no rank has a row of it")
    return Shards(group.group_name, sizes)


def bits_of(number: Tensor | None) -> Tensor | None:
    """int32 [1] that differs where an fp32 number does; None of None."""
    return None if number is None else number.reshape(1).float().view(torch.int32)


def dtypes_of(arguments: dict[str, Any]) -> dict[str, str]:
    """The dtypes of the tensors among an operator's arguments, by name: absent ones are not there."""
    return {name: str(value.dtype) for name, value in arguments.items() if isinstance(value, Tensor)}


def _checksum(tensor: Tensor) -> Tensor:
    """int64, 0-d: differs, but by accident, where an element or its place does. Integers wrap."""
    flat = tensor.reshape(-1).long()
    return (flat * torch.arange(1, flat.numel() + 1, device=flat.device)).sum()
