"""Weighted sums of a few rows of a matrix each: the products of the sampled gradient.

A program makes a block of columns of one output row. It takes ENTRIES rows of the matrix at a time, each of which has
fp32 sums of its own, and adds those up at the end. A row without an entry is written as zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import Sums
from .launch import WEIGHTED_SUMS, on_device, require_contiguous


@triton.jit
def weighted_sums_kernel(begins, ends, index, values, source, out, width, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    begin, end = tl.load(begins + row), tl.load(ends + row)
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for start in range(begin, end, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        there = entries < end
        rows = tl.load(index + entries, mask=there, other=0).to(tl.int64)
        factors = tl.load(values + entries, mask=there, other=0.0)
        x = tl.load(source + rows[:, None] * width + cols[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        total += factors[:, None] * x.to(tl.float32)
    tl.store(out + row * width + cols, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


def weighted_sums(sums: Sums, source: Tensor, out: Tensor) -> None:
    """See ``portable.weighted_sums``."""
    require_contiguous(*sums, source, out)
    rows, width = out.shape
    with on_device(out):
        weighted_sums_kernel[(rows, triton.cdiv(width, WEIGHTED_SUMS.sizes["BLOCK"]))](
            *sums, source, out, width, **WEIGHTED_SUMS.sizes, **WEIGHTED_SUMS.options
        )
