"""What the loss costs: how many rows of logits to hold at once, and the memory and time that follow from it.

Every chunk of rows costs one pass over the fp32 weight-gradient accumulator (8 V H bytes moved), against 6 rows V H
FLOP of matrix products. Few large chunks win; a chunk larger than ``ROWS_WORTHWHILE`` saves less than about 1% more and
only costs memory, so that is where a GPU stops, or at 1 GiB. On a CPU the default is 256 MiB.

``chunk_rows`` is what the library itself asks; ``fused_memory`` and ``naive_memory`` predict a call's bytes from it.
"""

from __future__ import annotations

import math
import platform
from functools import cache
from typing import NamedTuple

import torch

from .layout import require

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
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    device: torch.device,
    workspace_bytes: int | None,
) -> torch.dtype:
    """What the weight's gradient adds up in: fp32, unless there is a single product to add, and it is 16-bit anyway.

    Where one chunk holds all ``positions``, the product of a CPU, rounded to 16 bits as it is written, is the gradient
    as it stands, and an fp32 copy would hold the same numbers in twice the memory.
    """
    if device.type != "cpu" or torch.float32 in (dtype, weight_dtype):
        return torch.float32
    single = chunk_rows(positions, vocab, dtype, device, workspace_bytes) >= positions
    return dtype if single else torch.float32


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
    def rows(self) -> int:
        """Rows of logits held at a time."""
        return chunk_rows(self.tokens, self.vocab, self.dtype, self.device, self.workspace_bytes)

    @property
    def chunks(self) -> int:
        return math.ceil(self.tokens / self.rows) if self.rows else 0

    @property
    def weight_gradient_dtype(self) -> torch.dtype:
        """What the weight's gradient adds up in."""
        positions = self.tokens if self.positions is None else self.positions
        weight_dtype = self.weight_dtype or self.dtype
        return weight_gradient_dtype(positions, self.vocab, self.dtype, weight_dtype, self.device, self.workspace_bytes)

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
    """``fused_klq_loss``: one chunk of logits, an fp32 weight gradient, and the gradients themselves.

    Forward makes the gradients; backward scales them, which for a 16-bit weight writes a second, 16-bit gradient beside
    the fp32 accumulator. On a CPU a 16-bit accumulation goes through an extra strip of products, or where one chunk is
    all there is needs no accumulator (``weight_gradient_dtype``); one without 16-bit products widens strips instead, of
    which the allocator keeps as much again for the next.
    """
    d_hidden, d_weight = _head_gradients(p)
    masked = p.positions is not None and p.positions != p.tokens
    row_bytes = p.hidden * p.dtype.itemsize
    in_fp32 = p.weight_gradient_dtype == torch.float32
    accumulator = 4 * p.vocab * p.hidden * p.weight_gradient * in_fp32
    wide = widens(p.dtype, p.device)
    strips = p.weight_gradient and p.device.type == "cpu" and p.dtype != p.weight_gradient_dtype and not wide
    cast = p.vocab * row_bytes if p.weight_dtype not in (None, p.dtype) else 0
    forward = _nonzero(
        logits_chunk=p.rows * row_stride(p.vocab) * p.dtype.itemsize,
        weight_gradient_fp32=accumulator,
        weight_gradient=d_weight * (not in_fp32),
        hidden_gradient=d_hidden,
        gathered_hidden_chunk=p.rows * row_bytes * masked,
        hidden_gradient_chunk=p.rows * row_bytes * p.hidden_gradient,
        weight_cast=cast,
        product_strip=min(STRIP_ROWS, p.vocab) * p.hidden * p.dtype.itemsize * strips,
        widened_strips=8 * (min(WIDE_COLUMNS, p.vocab) * (p.rows + p.hidden) + p.rows * p.hidden) * wide,
    )
    backward = _nonzero(
        weight_gradient_fp32=accumulator,
        weight_gradient=d_weight if (p.weight_dtype or p.dtype) != torch.float32 else 0,
        hidden_gradient=d_hidden,
    )
    return Memory(forward, backward)


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
