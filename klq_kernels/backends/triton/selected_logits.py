"""Dot products of each token's hidden state with the rows of the head that it takes, and the logits made of them.

A program takes ENTRIES rows of one token. It walks the width of the head BLOCK columns at a time, each row with fp32
sums of its own, which are added up at the end. BLOCK is what a warp reads at 16 bytes a thread: a row is one warp's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import Chosen
from .launch import SELECTED_LOGITS, on_device, require_contiguous
from .math import soft_cap


@triton.jit
def selected_logits_kernel(
    hidden, positions, ids, weight, bias, out, slopes, width, vocab, entries, atoms, scale, softcap,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.cdiv(entries, ENTRIES)  # of one token
    token = (program // programs).to(tl.int64)
    entry = program % programs * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < entries
    wanted = tl.load(ids + token * (entries // atoms) + entry // atoms, mask=there, other=0)
    known = tl.minimum(tl.maximum(wanted, 0), vocab - 1)
    rows = known * atoms + entry % atoms
    place = token
    if positions is not None:
        place = tl.load(positions + token)
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        h = tl.load(hidden + place * width + cols, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + rows[:, None] * width + cols[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        total += h[None, :] * w.to(tl.float32)
    z = tl.sum(total, axis=1)
    if bias is not None:
        z += tl.load(bias + rows, mask=there, other=0.0)
    if softcap is not None:
        z, slope = soft_cap(z, softcap)
        tl.store(slopes + token * entries + entry, slope, mask=there)
    z = tl.where(known == wanted, z * scale, float("nan"))
    tl.store(out + token * entries + entry, z, mask=there)


def selected_logits(
    chosen: Chosen,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    slope: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """See ``portable.selected_logits``."""
    (hidden, positions), ids, atoms = chosen
    require_contiguous(hidden, positions, ids, weight, bias, out, slope)
    n, k = ids.shape
    config = SELECTED_LOGITS[weight.element_size()]
    with on_device(out):
        selected_logits_kernel[(n * triton.cdiv(k * atoms, config.sizes["ENTRIES"]),)](
            hidden, positions, ids, weight, bias, out, slope, weight.shape[1], weight.shape[0] // atoms, k * atoms,
            atoms, scale, softcap, **config.sizes, **config.options,
        )  # fmt: skip
