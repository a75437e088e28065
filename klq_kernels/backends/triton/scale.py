"""A gradient times the incoming scalar of backward, in the dtype of the input it belongs to.

The scalar is almost always 1. Where the result is to lie where the gradient already lies, there is then nothing to do:
each program reads the scalar and ends. Only the device knows it, so only a kernel can leave the work out without a
synchronisation. Otherwise it is one read and one write, rounded once. A few thousand programs walk over all blocks, so
that a launch that has nothing to do ends after a few microseconds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import SCALE, on_device, require_contiguous

MOST_PROGRAMS = 4096


@triton.jit
def scale_kernel(source, scale, out, elements, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(scale)
    if not IN_PLACE or factor != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(elements, BLOCK), tl.num_programs(0)):
            i = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = i < elements
            x = tl.load(source + i, mask=inside).to(tl.float32)
            tl.store(out + i, (x * factor).to(out.dtype.element_ty), mask=inside)


def scale(source: Tensor, factor: Tensor, out: Tensor) -> None:
    """See ``portable.scale``."""
    n = source.numel()
    if n == 0:
        return
    require_contiguous(source, out)
    in_place = source.data_ptr() == out.data_ptr()
    with on_device(source):
        scale_kernel[(min(triton.cdiv(n, SCALE.sizes["BLOCK"]), MOST_PROGRAMS),)](
            source, factor, out, n, IN_PLACE=in_place, **SCALE.sizes, **SCALE.options
        )
