"""The bytes that a call of the loss needs over its inputs, fused and naive, term by term, and why they are as many."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import backends
from ..vocabulary import chunking
from ..vocabulary.sampling import room_per_row

SEGMENT = 256  # columns of which a GPU's kernel keeps a sum (``backends.triton.row_select``)


class Problem(NamedTuple):
    """A call of the loss: ``tokens`` valid rows among ``positions``, and which gradients are needed."""

    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    device: torch.device
    positions: int | None = None  # of hidden; None where all are valid
    weight_dtype: torch.dtype | None = None  # None: as dtype
    hidden_gradient: bool = True
    weight_gradient: bool = True
    workspace_bytes: int | None = None
    fp32_logits: bool = False
    samples: int = 0  # of a sampled gradient; 0: dense

    @property
    def places(self) -> int:
        """Rows of hidden, valid or not."""
        return self.tokens if self.positions is None else self.positions

    @property
    def dtypes(self) -> chunking.HeadDtypes:
        """Of the products, and of the logits."""
        return chunking.head_dtypes(self.dtype, self.device, fp32_logits=self.fp32_logits)

    @property
    def vocabulary_major(self) -> bool:
        """Whether the backend of this device stores logits entry by entry of the vocabulary."""
        return backends.vocabulary_major(self.device)

    @property
    def keeps_logits(self) -> bool:
        """Whether logits are needed again for a gradient."""
        return self.hidden_gradient or self.weight_gradient

    @property
    def sampled(self) -> bool:
        """Whether a gradient is sampled, if one is needed."""
        return self.samples > 0 and self.keeps_logits

    @property
    def row_bytes(self) -> int:
        """Of a row of logits."""
        padded = self.device.type != "cpu"
        return (chunking.row_stride(self.vocab) if padded else self.vocab) * self.dtypes.logits.itemsize

    @property
    def _rows_inside(self) -> int:
        """Rows of logits, of a sampled gradient, at a time in the memory of the weight's gradient; 0: they are not."""
        if not (self.sampled and self.weight_gradient):
            return 0
        memory = self.vocab * self.hidden * self.weight_gradient_dtype.itemsize
        return chunking.rows_inside(self.tokens, self.row_bytes, memory)

    @property
    def rows(self) -> int:
        """Rows of logits held at a time."""
        if self._rows_inside:
            return self._rows_inside
        if not self.vocabulary_major:
            return chunking.chunk_rows(
                self.tokens, self.vocab, self.dtypes.logits, self.device, self.workspace_bytes, room=self.room
            )
        return chunking.strip_chunk_rows(
            self.tokens, self.vocab, self.dtypes.logits, self.device, self.workspace_bytes, keep=self.keeps_logits,
            room=self.room,
        )  # fmt: skip

    @property
    def strip_entries(self) -> int:
        """Entries of the vocabulary worked on at a time: all, unless they come in strips."""
        if not self.vocabulary_major:
            return self.vocab
        products = self.dtypes.products
        computed = torch.float32 if chunking.widens(products, self.device) else products
        return chunking.strip_entries(self.rows, self.vocab, computed, self.workspace_bytes)

    @property
    def room(self) -> int:
        """Rows that may make one chunk whatever the default workspace (``chunking``)."""
        if not self.weight_gradient or self.sampled:
            return 0
        if not self.vocabulary_major:
            return chunking.rows_for_accumulator(
                self.hidden, self.dtypes.logits, self.weight_gradient_dtype, self.device
            )
        return chunking.rows_in_one_chunk(
            self.hidden, self.dtypes.logits, self.weight_gradient_dtype, self.workspace_bytes
        )

    @property
    def in_gradient(self) -> bool:
        """Whether the logits lie in the memory that becomes the weight's gradient."""
        if self.sampled:
            return self._rows_inside > 0
        if not (self.weight_gradient and self.vocabulary_major):
            return False
        return self.tokens <= chunking.rows_in_gradient(self.hidden, self.dtypes.logits, self.weight_gradient_dtype)

    @property
    def chunks(self) -> int:
        return math.ceil(self.tokens / self.rows) if self.rows else 0

    @property
    def weight_gradient_dtype(self) -> torch.dtype:
        """The dtype that the weight's gradient adds up in."""
        weight_dtype = self.weight_dtype or self.dtype
        return chunking.weight_gradient_dtype(
            self.places, self.vocab, self.hidden, self.dtypes, weight_dtype, self.device, self.workspace_bytes,
            vocabulary_major=self.vocabulary_major, sampled=self.sampled,
        )  # fmt: skip

    @property
    def gemm_flop(self) -> int:
        """G: one matrix product over the vocabulary."""
        return 2 * self.tokens * self.vocab * self.hidden


class Memory(NamedTuple):
    """Bytes over the inputs, term by term, of the moment that needs most (``forward`` or ``backward``)."""

    forward: dict[str, int]
    backward: dict[str, int]

    @property
    def peak(self) -> int:
        return max(sum(self.forward.values()), sum(self.backward.values()))

    @property
    def terms(self) -> dict[str, int]:
        """The terms of the larger of the two."""
        return max(self.forward, self.backward, key=lambda terms: sum(terms.values()))


def _head_gradients(p: Problem) -> tuple[int, int]:
    """Bytes of the gradients that the caller receives: (hidden, weight)."""
    weight_dtype = p.weight_dtype or p.dtype
    return (
        p.places * p.hidden * p.dtype.itemsize * p.hidden_gradient,
        p.vocab * p.hidden * weight_dtype.itemsize * p.weight_gradient,
    )


def _nonzero(**terms: int) -> dict[str, int]:
    return {name.replace("_", " "): size for name, size in terms.items() if size}


def fused_memory(p: Problem) -> Memory:
    """``fused_klq_loss``: one chunk of logits, the weight's gradient in what it adds up in, the gradients themselves.

    Forward makes the gradients; backward scales them, which for a 16-bit weight whose gradient added up in fp32 writes
    a second, 16-bit one beside it.
    """
    d_hidden, d_weight = _head_gradients(p)
    masked = p.places != p.tokens
    products = p.dtypes.products
    row_bytes = p.hidden * products.itemsize
    widened = products != p.dtype  # fp32 copies of what comes in, and an fp32 gradient of hidden
    added_up_as_it_is = p.weight_gradient_dtype == (p.weight_dtype or p.dtype)
    accumulator = 0 if added_up_as_it_is else 4 * p.vocab * p.hidden * p.weight_gradient
    forward = _nonzero(
        weight_gradient_fp32=accumulator,
        weight_gradient=d_weight * added_up_as_it_is,
        hidden_gradient=p.places * row_bytes * p.hidden_gradient,
        hidden_cast=p.places * row_bytes * widened,
        gathered_hidden_chunk=p.rows * row_bytes * masked,
        weight_cast=p.vocab * row_bytes if (p.weight_dtype or p.dtype) != products else 0,
        entries=_entries(p) if p.sampled else 0,
        valid_hidden_gradient=p.tokens * row_bytes * (p.sampled and masked and p.hidden_gradient),
        **(_strip_buffers(p) if p.vocabulary_major else _chunk_buffers(p)),
    )
    backward = _nonzero(
        weight_gradient_fp32=accumulator,
        weight_gradient=d_weight,
        hidden_gradient=d_hidden,
        hidden_gradient_fp32=p.places * row_bytes * p.hidden_gradient * widened,
    )
    return Memory(forward, backward)


def _entries(p: Problem) -> int:
    """Bytes of a sampled gradient's entries: column and value of each. For the weight's gradient also token, value,
    column and place of each, sorted by columns, with the bounds of each column.
    """
    room = p.tokens * room_per_row(p.samples, p.vocab)
    by_segment = p.rows * math.ceil(p.vocab / SEGMENT) * 8 * (p.device.type != "cpu")
    return room * (8 + 24 * p.weight_gradient) + 16 * p.vocab * p.weight_gradient + by_segment


def _chunk_buffers(p: Problem) -> dict[str, int]:
    """The buffers of ``token_major``. On a CPU a 16-bit accumulation in fp32 goes through an extra strip of products; a
    CPU without 16-bit products widens strips instead (``chunking.widens``), of which the allocator keeps as much again.
    """
    products, logits = p.dtypes
    wide = chunking.widens(products, p.device)
    if p.sampled:
        return {
            "logits_chunk": p.rows * p.row_bytes * (not p.in_gradient),
            "widened_strips": 8
            * (min(chunking.WIDE_COLUMNS, p.vocab) * (p.rows + p.hidden) + p.rows * p.hidden)
            * wide,
        }
    strips = p.weight_gradient and p.device.type == "cpu" and products != p.weight_gradient_dtype and not wide
    apart = p.rows != p.places if p.device.type == "cpu" else p.tokens != p.places  # from where its rows belong
    return {
        "logits_chunk": p.rows * chunking.row_stride(p.vocab) * logits.itemsize,
        "hidden_gradient_chunk": p.rows * p.hidden * products.itemsize * p.hidden_gradient * apart,
        "product_strip": min(chunking.STRIP_ROWS, p.vocab) * p.hidden * products.itemsize * strips,
        "widened_strips": 8 * (min(chunking.WIDE_COLUMNS, p.vocab) * (p.rows + p.hidden) + p.rows * p.hidden) * wide,
    }


def _strip_buffers(p: Problem) -> dict[str, int]:
    """The buffers of ``vocabulary_major``."""
    products, logits = p.dtypes
    wide = chunking.widens(products, p.device)
    computed = torch.float32 if wide else products
    entries = p.strip_entries
    own = 0 if p.in_gradient else p.vocab * p.rows * logits.itemsize
    strip = entries * p.rows * computed.itemsize
    if p.sampled:
        return {
            "logits_chunk": own,
            "logits_strip": strip * (not own or wide),
            "widened_weight_strip": 4 * entries * p.hidden * wide,
            "widened_hidden_chunk": 4 * p.rows * p.hidden * wide,
        }
    narrow = computed != torch.float32
    rounded = p.weight_gradient and p.weight_gradient_dtype != computed
    return {
        "logits_chunk": own * p.keeps_logits,
        "logits_strip": strip * (not own or wide or not p.keeps_logits),
        "rounded_strip": entries * p.rows * products.itemsize * (wide and not p.keeps_logits),
        "turned_strip": strip * narrow * p.hidden_gradient,
        "hidden_gradient_chunk": p.rows * p.hidden * (4 + products.itemsize * narrow) * p.hidden_gradient,
        "product_strip": entries * p.hidden * computed.itemsize * rounded,
        "widened_weight_strip": 4 * entries * p.hidden * wide,
        "widened_hidden_chunk": 4 * p.rows * p.hidden * wide,
    }


def naive_memory(p: Problem) -> Memory:
    """Full logits through ``F.linear``, ``F.cross_entropy`` and autograd, all in the dtype of the model.

    Backward holds the log-softmax, the gradient by it and the gradient by the logits; later the last of them beside the
    gradients of hidden and weight.
    """
    d_hidden, d_weight = _head_gradients(p)
    masked = p.places != p.tokens
    gathered = p.tokens * p.hidden * p.dtype.itemsize * masked
    logits = p.tokens * p.vocab * p.dtype.itemsize
    cast = p.vocab * p.hidden * p.dtype.itemsize if p.weight_dtype not in (None, p.dtype) else 0
    largest = _nonzero(
        log_softmax=logits, its_gradient=logits, logits_gradient=logits, gathered_hidden=gathered, weight_cast=cast
    )
    last = _nonzero(
        logits_gradient=logits,
        weight_gradient=d_weight,
        hidden_gradient=d_hidden,
        gathered_hidden=gathered,
        weight_cast=cast,
        hidden_gradient_of_valid_rows=gathered * p.hidden_gradient,
    )
    return Memory(largest, last)


def why_chunks(p: Problem) -> str:
    """The chunk size that ``chunk_rows`` chose and the reason for it, in a sentence."""
    row_bytes = chunking.row_stride(p.vocab) * p.dtypes.logits.itemsize
    size = f"{p.rows:,} rows of logits at a time, {p.rows * row_bytes / chunking.MIB:,.0f} MiB"
    if p.in_gradient and p.chunks > 1:
        return f"{size}, in {p.chunks} even chunks, in the memory that becomes the weight's gradient: no workspace"
    if p.in_gradient:
        return f"all {size}, in the memory that becomes the weight's gradient: no workspace, one chunk"
    if p.chunks <= 1:
        if p.rows * row_bytes > chunking.GPU_WORKSPACE and p.workspace_bytes is None:
            return f"all {size}: no more than fp32 sums of the weight's gradient, so there is one chunk"
        return f"all {size}: they fit the workspace, so there is one chunk and no chunking overhead"
    if p.workspace_bytes is not None:
        limit = f"the {p.workspace_bytes / chunking.MIB:,.0f} MiB of workspace_bytes"
    elif p.device.type == "cpu":
        limit = f"the {chunking.CPU_WORKSPACE // chunking.MIB} MiB that a CPU gets by default"
    elif (sums := p.room * row_bytes) > chunking.GPU_WORKSPACE and p.room <= chunking.ROWS_WORTHWHILE:
        limit = f"the {sums / chunking.MIB:,.0f} MiB that fp32 sums of the weight's gradient take"
    elif p.rows * row_bytes > chunking.GPU_WORKSPACE * 0.5:
        limit = f"the {chunking.GPU_WORKSPACE // chunking.MIB} MiB that a GPU gets by default"
    else:
        limit = f"{chunking.ROWS_WORTHWHILE:,} rows, beyond which a larger chunk saves less than 1% of the time"
    return f"{size}, in {p.chunks} even chunks: bounded by {limit}"
