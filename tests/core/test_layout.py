"""Padded and packed are two ways to say which rows there are, and where each sequence ends."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from strategies import masks
from torch import Tensor
from watch import Watch

from klq_kernels import Packing, pack, reference
from klq_kernels.call import layout


def test_pack_of_a_padded_mask() -> None:
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])
    packing = pack(mask=mask)
    assert packing.shape == (3, 3)
    assert packing.rows.tolist() == [1, 2, 6, 8]
    assert packing.cu_seqlens.tolist() == [0, 3, 6, 9]
    assert packing.row_cu_seqlens.tolist() == [0, 2, 2, 4]
    assert packing.row_cu_seqlens.dtype == torch.int32


@given(mask=masks())
def test_rows_are_the_oracles_sequences(mask: Tensor) -> None:
    for packing in (pack(mask=mask), pack(mask=mask.flatten(), cu_seqlens=pack(mask=mask).cu_seqlens)):
        ends = packing.row_cu_seqlens.tolist()
        rows = [packing.rows.tolist()[a:b] for a, b in pairwise(ends)]
        assert rows == list(reference.sequences(mask.shape, mask, None))


@given(mask=masks())
def test_rows_go_out_and_come_back(mask: Tensor) -> None:
    packing = pack(mask=mask)
    numbers = torch.arange(1.0, mask.numel() + 1)
    taken = layout.take_rows(numbers, packing.rows)
    assert taken is not None
    assert torch.equal(taken, numbers[mask.flatten()])
    assert torch.equal(layout.put_rows(taken, packing.rows, mask.numel()), numbers * mask.flatten())


@given(mask=masks())
def test_what_ends_with_a_sequence_is_0_at_its_last_row(mask: Tensor) -> None:
    packing: Packing = pack(mask=mask)
    lengths = [len(steps) for steps in reference.sequences(mask.shape, mask, None)]
    expected = [float(t < length - 1) for length in lengths for t in range(length)]
    assert layout.zero_ends(torch.ones(sum(lengths)), packing.row_cu_seqlens).tolist() == expected


def test_a_packing_is_searched_for_once() -> None:
    """The epochs of a batch pay the search for valid rows, a synchronisation on a GPU, once: when it is packed."""
    mask = torch.tensor([[True, False], [True, True]])
    made = pack(mask=mask)
    tokens = torch.zeros(2, 2)
    with Watch() as watch:
        found = layout.layout_of(tokens, mask=None, cu_seqlens=None, packing=made)
        layout.valid_rows(**found.row_args(), positions=4)
    assert not any("nonzero" in call for call in watch.calls)
    with Watch() as watch:
        layout.valid_rows(**layout.layout_of(tokens, mask=mask, cu_seqlens=None).row_args(), positions=4)
    assert any("nonzero" in call for call in watch.calls)
