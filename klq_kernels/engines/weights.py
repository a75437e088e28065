"""A model's weights on their way into another process: safetensors files of bounded size, one at a time.

Each file holds a bucket of weights, and is removed as soon as the other process has read it. So neither process needs
memory for a second model. Where the machine has memory that looks like a folder (/dev/shm), files never reach a disk.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..call.checks import require

BUCKET_BYTES = 256 * 2**20
SHARED_MEMORY = Path("/dev/shm")


def buckets(weights: Iterable[tuple[str, Tensor]], size: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
    """Copies of the weights on the CPU, in groups of at most ``size`` bytes (or one weight that is larger)."""
    require(size >= 1, "bucket_bytes", f"must be at least 1, got {size}")
    bucket: dict[str, Tensor] = {}
    used = 0
    for name, weight in weights:
        if bucket and used + weight.nbytes > size:
            yield bucket
            bucket, used = {}, 0
        # a copy in any case: a gathered weight is gone when the next is asked for
        bucket[name] = weight.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        used += weight.nbytes
    if bucket:
        yield bucket


@contextmanager
def written(bucket: dict[str, Tensor], folder: Path) -> Iterator[Path]:
    """The bucket as a file in ``folder``, which is there inside and gone afterwards."""
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".safetensors", delete=False) as file:
        path = Path(file.name)
    try:
        save_file(bucket, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def folder_for(size: int) -> tempfile.TemporaryDirectory[str]:
    """A new folder for buckets of ``size`` bytes: in shared memory where there is room for several, else on a disk."""
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 8 * size
    place = SHARED_MEMORY if roomy else None
    return tempfile.TemporaryDirectory(prefix="klq_weights_", dir=place, ignore_cleanup_errors=True)
