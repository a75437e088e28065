"""The head that an operator's arguments describe, in the dtypes of its products."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import vocabulary_major
from ..vocabulary import chunking
from ..vocabulary.chunks import Head, Shard


class HeadArguments(Protocol):
    """The arguments that every operator on a head has."""

    @property
    def hidden(self) -> Tensor: ...  # [M, H]
    @property
    def weight(self) -> Tensor: ...  # [V, H], or this rank's rows of it
    @property
    def bias(self) -> Tensor | None: ...  # [V]
    @property
    def group(self) -> str: ...  # the name of the processes that share the head, "" for none
    @property
    def shard_sizes(self) -> list[int]: ...  # how many rows of the weight each of them has; none where it is whole
    @property
    def temperature(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def fp32_logits(self) -> bool: ...
    @property
    def workspace_bytes(self) -> int | None: ...
    @property
    def samples(self) -> int: ...


def make_head(given: HeadArguments, gradient_dtype: torch.dtype) -> Head:
    """The head in the dtype of its products (``chunking.head_dtypes``): an fp32 master weight is cast for them. The
    bias is added to the logits, in their dtype.
    """
    dtypes = head_dtypes(given)
    weight = given.weight.detach().to(dtypes.products)
    bias = None if given.bias is None else given.bias.detach().to(dtypes.logits)
    shard = None
    if given.shard_sizes:
        group = group_named(given.group)
        shard = Shard(group, group.rank(), tuple(given.shard_sizes))
    return Head(weight, bias, 1.0 / given.temperature, given.softcap, gradient_dtype, dtypes.logits, shard)


def group_named(name: Any) -> dist.ProcessGroup:
    """The group that an operator was told the name of, a str; newer PyTorch has a type of its own for it."""
    return dist.distributed_c10d._resolve_process_group(name)  # as PyTorch's functional collectives do


def head_dtypes(given: HeadArguments) -> chunking.HeadDtypes:
    """``chunking.head_dtypes`` of these inputs."""
    return chunking.head_dtypes(given.hidden.dtype, given.hidden.device, fp32_logits=given.fp32_logits)


def vocabulary(given: HeadArguments) -> int:
    """V, of all ranks together."""
    return sum(given.shard_sizes) if given.shard_sizes else given.weight.shape[0]


def weight_gradient_dtype(given: HeadArguments, *, keep: bool = True) -> torch.dtype:
    """``chunking.weight_gradient_dtype`` of these inputs, the same on all ranks."""
    rows = max(given.shard_sizes) if given.shard_sizes else given.weight.shape[0]
    return chunking.weight_gradient_dtype(
        given.hidden.shape[0], rows, given.weight.shape[1], head_dtypes(given), given.weight.dtype,
        given.hidden.device, given.workspace_bytes, vocabulary_major=vocabulary_major(given.hidden.device), keep=keep,
        sampled=given.samples > 0,
    )  # fmt: skip
