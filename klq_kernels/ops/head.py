"""The head that an operator's arguments describe, in the dtypes of its products, and the gradients handed back."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import vocabulary_major
from ..call import layout
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
    weight = layout.constant(given.weight, dtypes.products)
    bias = None if given.bias is None else layout.constant(given.bias, dtypes.logits)
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


class Gradients(NamedTuple):
    """In the dtypes of hidden, weight and bias; those that are not needed are empty."""

    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


class GradientArguments(Protocol):
    """The arguments that every operator has that computes a head's gradients."""

    @property
    def hidden(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def need_hidden(self) -> bool: ...
    @property
    def need_weight(self) -> bool: ...
    @property
    def need_bias(self) -> bool: ...


class FoundGradients(Protocol):
    """A head's gradients as a pass over the vocabulary leaves them (``chunks.VocabularyWork``)."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def fake_gradients(given: GradientArguments) -> Gradients:
    """Empty tensors like the gradients."""

    def shaped(like: Tensor | None, needed: bool) -> Tensor:
        if like is None or not needed:
            return given.hidden.new_empty(0)
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    return Gradients(
        shaped(given.hidden, given.need_hidden),
        shaped(given.weight, given.need_weight),
        shaped(given.bias, given.need_bias),
    )


def rounded_gradients(found: FoundGradients, given: GradientArguments) -> Gradients:
    """The gradients that a pass found, in the dtypes of their arguments."""

    def rounded(gradient: Tensor | None, like: Tensor | None) -> Tensor:
        if gradient is None or like is None:
            return given.hidden.new_empty(0)
        return gradient.to(like.dtype)

    return Gradients(
        rounded(found.hidden, given.hidden), rounded(found.weight, given.weight), rounded(found.bias, given.bias)
    )
