"""How many rows of logits to hold at once.

Every chunk of rows costs one pass over the fp32 weight-gradient accumulator (8 V H bytes moved), against 6 rows V H
FLOP of matrix products. Few large chunks win; a chunk larger than ``ROWS_WORTHWHILE`` saves less than about 1% more and
only costs memory, so that is where a GPU stops, or at 1 GiB. On a CPU the default is 256 MiB.
"""

from __future__ import annotations

import math

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
# Chunks begin at multiples of this many rows, so that slices of per-row fp32 vectors begin at 16-byte addresses.
CHUNK_MULTIPLE = 16


def row_stride(vocab: int) -> int:
    """Elements from one row of a logits buffer to the next."""
    return math.ceil(vocab / ROW_ALIGNMENT) * ROW_ALIGNMENT


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
    if most >= CHUNK_MULTIPLE:
        most -= most % CHUNK_MULTIPLE
    chunks = math.ceil(n / most)
    even = math.ceil(n / chunks) if chunks else 0
    return min(math.ceil(even / CHUNK_MULTIPLE) * CHUNK_MULTIPLE, most)
