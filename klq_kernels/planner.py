"""What the loss costs: how many rows of logits to hold at once, and the memory and time that follow from it.

Every chunk of rows costs one pass over the fp32 weight-gradient accumulator (8 V H bytes moved), against 6 rows V H
FLOP of matrix products. Few large chunks win; a chunk larger than ``ROWS_WORTHWHILE`` saves less than about 1% more and
only costs memory, so that is where a GPU stops, or at 1 GiB. On a CPU the default is 256 MiB.

A CPU's native backend needs no chunk of logits where they fit into the weight's gradient (``strip_chunk_rows``).

``chunk_rows`` is what the library itself asks; ``fused_memory`` and ``naive_memory`` predict a call's bytes from it.
"""

from __future__ import annotations

import math
import platform
from functools import cache
from typing import NamedTuple

import torch

from .layout import require
from .ops.dispatch import backend_for

MIB = 2**20
CPU_WORKSPACE = 256 * MIB
GPU_WORKSPACE = 1024 * MIB
# 8 V H bytes at bandwidth b against 6 rows V H FLOP at rate f is a share of (8 f / 6 b) / rows; data-centre GPUs have
# f / b near 200 FLOP per byte, which makes 1% of 24k rows.
ROWS_WORTHWHILE = 24_576
# Rows of a logits buffer start at multiples of this many elements, so that every row can be read 16 bytes at a time.
ROW_ALIGNMENT = 64
# Rows of the fp32 accumulator updated at a time where the device's GEMM cannot write fp32 from 16-bit inputs.
STRIP_ROWS = 4096
# Columns of logits widened to fp32 at a time where a CPU does not multiply 16-bit numbers.
WIDE_COLUMNS = 2048
# A strip of the vocabulary (``vocabulary_major``): large enough for its products to run at full speed, small enough to
# stay in a last-level cache.
STRIP_BYTES = 16 * MIB
MOST_ENTRIES, FEWEST_ENTRIES = 4096, 512


def row_stride(vocab: int) -> int:
    """Elements from one row of a logits buffer to the next."""
    return _round_up(vocab, ROW_ALIGNMENT)


def chunk_rows(n: int, vocab: int, dtype: torch.dtype, device: torch.device, workspace_bytes: int | None) -> int:
    """Rows of logits per chunk: as many as the workspace holds, at least 1, split evenly over the chunks.

    Args:
        n: number of valid rows.
        vocab: V.
        dtype: of the logits.
        device: decides the default workspace.
        workspace_bytes: the caller's limit for one chunk of logits, or None for the default.

    Raises:
        ValueError: where the workspace cannot hold a single row.
    """
    row_bytes = row_stride(vocab) * dtype.itemsize
    if workspace_bytes is not None:
        require(
            workspace_bytes >= row_bytes,
            "workspace_bytes",
            f"must hold at least one row of logits, {row_bytes} bytes; got {workspace_bytes}",
        )
        most = workspace_bytes // row_bytes
    elif device.type == "cpu":
        most = max(CPU_WORKSPACE // row_bytes, 1)
    else:
        most = max(min(GPU_WORKSPACE // row_bytes, ROWS_WORTHWHILE), 1)
    # Chunks begin at multiples of 16 rows, so that slices of per-row fp32 vectors stay 16-byte aligned, and large ones,
    # where that costs little of the workspace, at multiples of 256, so that no GEMM tile is left half empty.
    multiple = 256 if most >= 2048 else 16 if most >= 16 else 1
    chunks = math.ceil(n / most)
    even = math.ceil(n / chunks) if chunks else 0
    return min(_round_up(even, multiple), most // multiple * multiple, n)


def vocabulary_major(device: torch.device) -> bool:
    """Whether logits on this device are stored entry by entry of the vocabulary (``vocabulary_major``)."""
    return device.type == "cpu" and backend_for(device).VOCABULARY_MAJOR


def rows_in_gradient(width: int, dtype: torch.dtype, gradient_dtype: torch.dtype) -> int:
    """How many rows of logits [V, rows] fit into the memory of the weight's gradient [V, width]."""
    return width * gradient_dtype.itemsize // dtype.itemsize


def rows_in_one_chunk(width: int, dtype: torch.dtype, gradient_dtype: torch.dtype, workspace_bytes: int | None) -> int:
    """How many rows of logits cost less kept at once than cut into chunks.

    Those that fit into the weight's gradient cost nothing. Beyond them, more than one chunk of 16-bit rows needs an
    fp32 accumulator beside the 16-bit gradient, 4 V width bytes; that much a buffer of logits may take instead, where
    the caller has set no limit.
    """
    room = rows_in_gradient(width, dtype, gradient_dtype)
    if workspace_bytes is None and gradient_dtype != torch.float32:
        room = max(room, 4 * width // dtype.itemsize)
    return room


def strip_chunk_rows(
    n: int, vocab: int, dtype: torch.dtype, device: torch.device, workspace_bytes: int | None, *, keep: bool, room: int
) -> int:
    """``chunk_rows`` where the vocabulary is walked in strips.

    Up to ``room`` rows whose logits are kept make one chunk (``rows_in_one_chunk``). Of logits that are not kept there
    is never more than a strip.
    """
    if not keep:
        vocab = min(vocab, FEWEST_ENTRIES)
    elif n <= room:
        return n
    return chunk_rows(n, vocab, dtype, device, workspace_bytes)


def strip_entries(rows: int, vocab: int, dtype: torch.dtype, workspace_bytes: int | None) -> int:
    """Entries of the vocabulary per strip of ``rows`` tokens, whose logits are of ``dtype``."""
    row_bytes = max(rows, 1) * dtype.itemsize
    most = max(STRIP_BYTES // row_bytes, FEWEST_ENTRIES)
    if workspace_bytes is not None:
        most = min(most, max(workspace_bytes // row_bytes, 1))
    return min(vocab, MOST_ENTRIES, most // 64 * 64 if most >= 64 else most)


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of these numbers; only of x86 it is known where it has not."""
    if dtype not in (torch.bfloat16, torch.float16) or platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        if dtype == torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    except (AttributeError, RuntimeError):  # a torch that does not tell: take its products as they are
        return True


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of these numbers run in fp32, strip by strip (``products``)."""
    return device.type == "cpu" and not _multiplies(dtype)


def weight_gradient_dtype(
    positions: int,
    vocab: int,
    width: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    device: torch.device,
    workspace_bytes: int | None,
    *,
    keep: bool = True,
) -> torch.dtype:
    """What the weight's gradient adds up in: fp32, unless there is a single product to add, and it is 16-bit anyway.

    Where one chunk holds all ``positions``, the product of a CPU, rounded to 16 bits as it is written, is the gradient
    as it stands, and an fp32 copy would hold the same numbers in twice the memory. Not in fp16, where gradients are
    carried at a scale (``GradientScale``) at which their sum over tokens may be too large. ``keep``: whether logits are
    kept from the forward to the gradient, as the loss does and the backward of log-probabilities does not.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or weight_dtype != torch.bfloat16:
        return torch.float32
    if vocabulary_major(device):
        room = rows_in_one_chunk(width, dtype, dtype, workspace_bytes)
        rows = strip_chunk_rows(positions, vocab, dtype, device, workspace_bytes, keep=keep, room=room)
    else:
        rows = chunk_rows(positions, vocab, dtype, device, workspace_bytes)
    return dtype if rows >= positions else torch.float32


def _round_up(x: int, multiple: int) -> int:
    return math.ceil(x / multiple) * multiple


class Problem(NamedTuple):
    """A call of the loss: ``tokens`` valid rows among ``positions``, and which gradients somebody will read."""

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

    @property
    def keeps_logits(self) -> bool:
        """Whether logits are needed again for a gradient."""
        return self.hidden_gradient or self.weight_gradient

    @property
    def rows(self) -> int:
        """Rows of logits held at a time."""
        if not vocabulary_major(self.device):
            return chunk_rows(self.tokens, self.vocab, self.dtype, self.device, self.workspace_bytes)
        return strip_chunk_rows(
            self.tokens, self.vocab, self.dtype, self.device, self.workspace_bytes, keep=self.keeps_logits,
            room=self._room,
        )  # fmt: skip

    @property
    def strip_entries(self) -> int:
        """Entries of the vocabulary worked on at a time: all, unless they come in strips."""
        if not vocabulary_major(self.device):
            return self.vocab
        computed = torch.float32 if widens(self.dtype, self.device) else self.dtype
        return strip_entries(self.rows, self.vocab, computed, self.workspace_bytes)

    @property
    def _room(self) -> int:
        if not self.weight_gradient:
            return 0
        return rows_in_one_chunk(self.hidden, self.dtype, self.weight_gradient_dtype, self.workspace_bytes)

    @property
    def in_gradient(self) -> bool:
        """Whether the logits lie in the memory that becomes the weight's gradient."""
        if not (self.weight_gradient and vocabulary_major(self.device)):
            return False
        return self.tokens <= rows_in_gradient(self.hidden, self.dtype, self.weight_gradient_dtype)

    @property
    def chunks(self) -> int:
        return math.ceil(self.tokens / self.rows) if self.rows else 0

    @property
    def weight_gradient_dtype(self) -> torch.dtype:
        """What the weight's gradient adds up in."""
        positions = self.tokens if self.positions is None else self.positions
        weight_dtype = self.weight_dtype or self.dtype
        return weight_gradient_dtype(
            positions, self.vocab, self.hidden, self.dtype, weight_dtype, self.device, self.workspace_bytes
        )

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
    positions = p.tokens if p.positions is None else p.positions
    weight_dtype = p.weight_dtype or p.dtype
    return (
        positions * p.hidden * p.dtype.itemsize * p.hidden_gradient,
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
    masked = p.positions is not None and p.positions != p.tokens
    row_bytes = p.hidden * p.dtype.itemsize
    added_up_as_it_is = p.weight_gradient_dtype == (p.weight_dtype or p.dtype)
    accumulator = 0 if added_up_as_it_is else 4 * p.vocab * p.hidden * p.weight_gradient
    forward = _nonzero(
        weight_gradient_fp32=accumulator,
        weight_gradient=d_weight * added_up_as_it_is,
        hidden_gradient=d_hidden,
        gathered_hidden_chunk=p.rows * row_bytes * masked,
        weight_cast=p.vocab * row_bytes if p.weight_dtype not in (None, p.dtype) else 0,
        **(_strip_buffers(p) if vocabulary_major(p.device) else _chunk_buffers(p)),
    )
    backward = _nonzero(
        weight_gradient_fp32=accumulator,
        weight_gradient=d_weight,
        hidden_gradient=d_hidden,
    )
    return Memory(forward, backward)


def _chunk_buffers(p: Problem) -> dict[str, int]:
    """What ``token_major`` holds. On a CPU a 16-bit accumulation in fp32 goes through an extra strip of products; one
    without 16-bit products widens strips instead, of which the allocator keeps as much again for the next.
    """
    wide = widens(p.dtype, p.device)
    strips = p.weight_gradient and p.device.type == "cpu" and p.dtype != p.weight_gradient_dtype and not wide
    return {
        "logits_chunk": p.rows * row_stride(p.vocab) * p.dtype.itemsize,
        "hidden_gradient_chunk": p.rows * p.hidden * p.dtype.itemsize * p.hidden_gradient,
        "product_strip": min(STRIP_ROWS, p.vocab) * p.hidden * p.dtype.itemsize * strips,
        "widened_strips": 8 * (min(WIDE_COLUMNS, p.vocab) * (p.rows + p.hidden) + p.rows * p.hidden) * wide,
    }


def _strip_buffers(p: Problem) -> dict[str, int]:
    """What ``vocabulary_major`` holds."""
    wide = widens(p.dtype, p.device)
    computed = torch.float32 if wide else p.dtype
    entries = p.strip_entries
    own = 0 if p.in_gradient else p.vocab * p.rows * p.dtype.itemsize
    strip = entries * p.rows * computed.itemsize
    narrow = computed != torch.float32
    rounded = p.weight_gradient and p.weight_gradient_dtype != computed
    return {
        "logits_chunk": own * p.keeps_logits,
        "logits_strip": strip * (not own or wide or not p.keeps_logits),
        "rounded_strip": entries * p.rows * p.dtype.itemsize * (wide and not p.keeps_logits),
        "turned_strip": strip * narrow * p.hidden_gradient,
        "hidden_gradient_chunk": p.rows * p.hidden * (4 + p.dtype.itemsize * narrow) * p.hidden_gradient,
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
    masked = p.positions is not None and p.positions != p.tokens
    gathered = p.tokens * p.hidden * p.dtype.itemsize * masked
    logits = p.tokens * p.vocab * p.dtype.itemsize
    largest = _nonzero(log_softmax=logits, its_gradient=logits, logits_gradient=logits, gathered_hidden=gathered)
    last = _nonzero(
        logits_gradient=logits,
        weight_gradient=d_weight,
        hidden_gradient=d_hidden,
        gathered_hidden=gathered,
        hidden_gradient_of_valid_rows=gathered * p.hidden_gradient,
    )
    return Memory(largest, last)


def why_chunks(p: Problem) -> str:
    """The chunk size that ``chunk_rows`` chose and the reason for it, in a sentence."""
    row_bytes = row_stride(p.vocab) * p.dtype.itemsize
    size = f"{p.rows:,} rows of logits at a time, {p.rows * row_bytes / MIB:,.0f} MiB"
    if p.in_gradient:
        return f"all {size}, in the memory that becomes the weight's gradient: no workspace, one chunk"
    if p.chunks <= 1:
        return f"all {size}: they fit the workspace, so there is one chunk and no chunking overhead"
    if p.workspace_bytes is not None:
        limit = f"the {p.workspace_bytes / MIB:,.0f} MiB of workspace_bytes"
    elif p.device.type == "cpu":
        limit = f"the {CPU_WORKSPACE // MIB} MiB that a CPU gets by default"
    elif p.rows * row_bytes > GPU_WORKSPACE * 0.5:
        limit = f"the {GPU_WORKSPACE // MIB} MiB that a GPU gets by default"
    else:
        limit = f"{ROWS_WORTHWHILE:,} rows, beyond which a larger chunk saves less than 1% of the time"
    return f"{size}, in {p.chunks} even chunks: bounded by {limit}"
