"""Weights in files of bounded size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from klq_kernels.engines.weights import buckets, folder_for, written


def test_buckets_hold_all_weights_once_and_in_order() -> None:
    sizes = [3, 3, 20, 1, 1, 1]
    given = [(str(i), torch.full((n,), float(i))) for i, n in enumerate(sizes)]
    found = list(buckets(iter(given), 6 * 4))
    assert [list(bucket) for bucket in found] == [["0", "1"], ["2"], ["3", "4", "5"]]
    for name, weight in given:
        (bucket,) = (b for b in found if name in b)
        assert torch.equal(bucket[name], weight)
    with pytest.raises(ValueError, match="bucket_bytes: must be at least 1"):
        next(buckets(given, 0))


def test_a_bucket_outlives_what_it_was_made_of() -> None:
    """Gathered weights are whole until the next is asked for; views and transposes are written as they look."""
    buffer = torch.zeros(2, 3)

    def gathered():
        for i in range(3):
            yield str(i), buffer.fill_(i).t()

    (bucket,) = buckets(gathered(), 10_000)
    assert [bucket[str(i)].unique().item() for i in range(3)] == [0, 1, 2]
    assert all(weight.is_contiguous() for weight in bucket.values())


def test_a_file_is_there_inside_and_gone_afterwards(tmp_path: Path) -> None:
    with written({"a": torch.arange(3.0)}, tmp_path) as path:
        assert torch.equal(load_file(path)["a"], torch.arange(3.0))
    assert list(tmp_path.iterdir()) == []
    with folder_for(2**80) as folder:  # too large for memory: on a disk
        assert "/dev/shm" not in folder
