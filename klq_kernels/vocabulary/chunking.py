"""The number of rows of logits held at once, and the dtype that the weight's gradient adds up in.

Every chunk of rows costs one pass over the fp32 weight-gradient accumulator (8 V H bytes moved), against 6 rows V H
FLOP of matrix products. Few large chunks win; a chunk larger than ``ROWS_WORTHWHILE`` saves less than about 1% more and
only costs memory, so that is where a GPU stops. It also stops at 1 GiB, or at the memory of the accumulator where that
is more. On a CPU the default is 256 MiB.

One chunk needs no fp32 accumulator beside a 16-bit gradient: its product is rounded once, as it is written. So where
all rows of logits take no more memory than that accumulator would (up to 2 H rows of 16 bits), they make one chunk.

A sampled gradient has neither an accumulator nor a second use of its logits: they lie where the weight's gradient is
going to be (``rows_inside``).

A backend that stores logits entry by entry of the vocabulary needs no chunk of them where they fit into the weight's
gradient (``strip_chunk_rows``). Callers say how the backend stores them; ``backends.vocabulary_major`` knows.
"""

from __future__ import annotations

import math
import platform
from functools import cache
from typing import NamedTuple

import torch

MIB = 2**20
CPU_WORKSPACE = 256 * MIB
GPU_WORKSPACE = 1024 * MIB
# 8 V H bytes at bandwidth b against 6 rows V H FLOP at rate f is a share of (8 f / 6 b) / rows; data-centre GPUs have
# f / b near 200 FLOP per byte, which makes 1% of 24k rows.
ROWS_WORTHWHILE = 24_576
# A product of so many rows with the weight runs at full speed.
ROWS_OF_A_PRODUCT = 512
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


def chunk_rows(
    n: int, vocab: int, dtype: torch.dtype, device: torch.device, workspace_bytes: int | None, *, room: int = 0
) -> int:
    """Rows of logits per chunk: as many as the workspace holds, at least 1, split evenly over the chunks.

    Args:
        n: number of valid rows.
        vocab: V.
        dtype: of the logits.
        device: decides the default workspace.
        workspace_bytes: the caller's limit for one chunk of logits, or None for the default.
        room: up to so many rows make one chunk by default, and on a GPU a chunk may have so many
            (``rows_for_accumulator``).

    Raises:
        ValueError: where the workspace cannot hold a single row.
    """
    if workspace_bytes is None and n <= room:
        return n
    row_bytes = row_stride(vocab) * dtype.itemsize
    if workspace_bytes is not None:
        if workspace_bytes < row_bytes:
            need = f"must hold at least one row of logits, {row_bytes} bytes"
            raise ValueError(f"workspace_bytes: {need}; got {workspace_bytes}")
        most = workspace_bytes // row_bytes
    elif device.type == "cpu":
        most = max(CPU_WORKSPACE // row_bytes, 1)
    else:
        most = max(min(max(GPU_WORKSPACE // row_bytes, room), ROWS_WORTHWHILE), 1)
    # Chunks begin at multiples of 16 rows, so that slices of per-row fp32 vectors stay 16-byte aligned, and large ones,
    # where that costs little of the workspace, at multiples of 256, so that no GEMM tile is left half empty.
    multiple = 256 if most >= 2048 else 16 if most >= 16 else 1
    chunks = math.ceil(n / most)
    even = math.ceil(n / chunks) if chunks else 0
    return min(_round_up(even, multiple), most // multiple * multiple, n)


def rows_in_gradient(width: int, dtype: torch.dtype, gradient_dtype: torch.dtype) -> int:
    """How many rows of logits [V, rows] fit into the memory of the weight's gradient [V, width]."""
    return width * gradient_dtype.itemsize // dtype.itemsize


def rows_inside(n: int, row_bytes: int, memory_bytes: int) -> int:
    """Rows per chunk of logits that lie in the memory of a gradient which is written after the last chunk; 0 where so
    few fit in that products of them would be slow.
    """
    fit = memory_bytes // max(row_bytes, 1)
    if fit >= n:
        return n
    fit = fit // 16 * 16
    return 0 if fit < ROWS_OF_A_PRODUCT else min(_round_up(math.ceil(n / math.ceil(n / fit)), 16), n)


def rows_for_accumulator(width: int, dtype: torch.dtype, gradient_dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of logits take the memory of an fp32 accumulator [V, width].

    On a CPU none where the gradient is fp32 itself, so that several chunks need no accumulator beside it. On a GPU it
    is the time of adding to it that counts.
    """
    return 0 if gradient_dtype == torch.float32 and device.type == "cpu" else 4 * width // dtype.itemsize


def rows_in_one_chunk(width: int, dtype: torch.dtype, gradient_dtype: torch.dtype, workspace_bytes: int | None) -> int:
    """How many rows of logits cost less kept at once than cut into chunks.

    Those that fit into the weight's gradient cost nothing. Beyond them, a buffer of logits may take the memory of the
    accumulator that it spares, where the caller has set no limit.
    """
    room = rows_in_gradient(width, dtype, gradient_dtype)
    return room if workspace_bytes is not None else max(room, 4 * width // dtype.itemsize)


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
    except (AttributeError, RuntimeError):  # this torch has no such query: use its products as they are
        return True


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of these numbers run in fp32, strip by strip (``products``)."""
    return device.type == "cpu" and not _multiplies(dtype)


class HeadDtypes(NamedTuple):
    """The dtype of a head's products, and of the logits that the first of them writes."""

    products: torch.dtype
    logits: torch.dtype


def head_dtypes(dtype: torch.dtype, device: torch.device, *, fp32_logits: bool) -> HeadDtypes:
    """For hidden states of ``dtype``. An NVIDIA GPU writes the fp32 sums of a 16-bit product as they are; elsewhere
    logits that are not to be rounded need products in fp32.
    """
    if not fp32_logits or dtype == torch.float32:
        return HeadDtypes(dtype, dtype)
    writes_sums = device.type == "cuda" and torch.version.hip is None
    return HeadDtypes(dtype if writes_sums else torch.float32, torch.float32)


def weight_gradient_dtype(
    positions: int,
    vocab: int,
    width: int,
    dtypes: HeadDtypes,
    weight_dtype: torch.dtype,
    device: torch.device,
    workspace_bytes: int | None,
    *,
    vocabulary_major: bool,
    keep: bool = True,
    sampled: bool = False,
) -> torch.dtype:
    """The dtype that the weight's gradient adds up in: fp32, unless it is rounded to 16 bits just once.

    Where one chunk holds all ``positions``, the product, rounded to 16 bits as it is written, is the gradient as it
    stands, and an fp32 copy would hold the same numbers in twice the memory. Not in fp16, where gradients are carried
    at a scale (``GradientScale``) at which their sum over tokens may be too large. A ``sampled`` gradient is always
    written once.

    ``vocabulary_major``: how the backend stores logits. ``keep``: whether they are kept from the forward to the
    gradient, as the loss does and the backward of log-probabilities does not.
    """
    dtype = dtypes.products
    if sampled:
        return torch.float32 if torch.float16 in (dtype, weight_dtype) else weight_dtype
    if dtype != torch.bfloat16 or weight_dtype != torch.bfloat16:
        return torch.float32
    if vocabulary_major:
        room = rows_in_one_chunk(width, dtype, dtype, workspace_bytes)
        rows = strip_chunk_rows(positions, vocab, dtype, device, workspace_bytes, keep=keep, room=room)
    else:
        room = rows_for_accumulator(width, dtypes.logits, dtype, device)
        rows = chunk_rows(positions, vocab, dtypes.logits, device, workspace_bytes, room=room)
    return dtype if rows >= positions else torch.float32


def _round_up(x: int, multiple: int) -> int:
    return math.ceil(x / multiple) * multiple
