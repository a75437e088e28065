"""Strategies for hypothesis: masks of every shape, awkward vocabularies, chunks that cut sequences anywhere."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

VOCABULARIES = [1, 2, 3, 17, 64, 131, 257]


@st.composite
def masks(draw: st.DrawFn, max_batch: int = 4, max_length: int = 8) -> Tensor:
    """bool [B, T], B and T from 0: holes anywhere, rows without a single token, batches without a single token."""
    batch, length = draw(st.integers(0, max_batch)), draw(st.integers(0, max_length))
    row = st.one_of(
        st.just([True] * length), st.just([False] * length), st.lists(st.booleans(), min_size=length, max_size=length)
    )
    rows = draw(st.lists(row, min_size=batch, max_size=batch))
    return torch.tensor(rows, dtype=torch.bool).reshape(batch, length)


seeds = st.integers(0, 2**16)
vocabularies = st.sampled_from(VOCABULARIES)
chunk_rows = st.one_of(st.none(), st.integers(1, 7))
