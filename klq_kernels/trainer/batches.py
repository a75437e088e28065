"""Token sequences as the trainer keeps them, and as a model reads them.

A ``Sequence`` is a prompt and its completion. ``collate`` lays several of them out for a backbone, padded on the right
or concatenated, and notes where the states are that matter: those that predict a trained token, and the one after the
last token of each sequence. All the rest of the trainer works on these rows alone, packed one sequence after another;
padding is known only here.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Sequence(NamedTuple):
    """One prompt with its completion; int64 and bool, on the CPU."""

    prompt: Tensor  # [P], P >= 1
    completion: Tensor  # [T]
    trained: Tensor  # bool [T], False at tokens the policy did not choose (the output of a tool, say)

    @property
    def ids(self) -> Tensor:
        return torch.cat([self.prompt, self.completion])

    @property
    def rows(self) -> int:
        """How many tokens are trained."""
        return int(self.trained.sum())


class Inputs(NamedTuple):
    """A batch for a backbone, and where its states are to be read; N trained tokens in S sequences."""

    input_ids: Tensor  # [B, L]; B = S padded, B = 1 concatenated
    attention_mask: Tensor | None  # [B, L]; None where sequences are told apart by their positions
    position_ids: Tensor  # [B, L]
    rows: Tensor  # int64 [N] into the B * L states: the one that predicts each trained token
    last: Tensor  # int64 [S] into them: the one after the last token of each sequence
    actions: Tensor  # int64 [N]
    cu_seqlens: Tensor  # int32 [S + 1], over the N rows

    def to(self, device: torch.device | str) -> Inputs:
        return Inputs(*(None if t is None else t.to(device, non_blocking=True) for t in self))  # type: ignore[arg-type]


def collate(sequences: Many[Sequence], *, pad_id: int, padding_free: bool) -> Inputs:
    """Lays sequences out for a backbone, on the CPU; they must not be empty in number."""
    lengths = torch.tensor([len(s.prompt) + len(s.completion) for s in sequences])
    if padding_free:
        begins = lengths.cumsum(0) - lengths
        input_ids = torch.cat([s.ids for s in sequences]).unsqueeze(0)
        position_ids = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
        attention_mask = None
    else:
        input_ids = pad_sequence([s.ids for s in sequences], batch_first=True, padding_value=pad_id)
        begins = torch.arange(len(sequences)) * input_ids.shape[1]
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        attention_mask = (position_ids < lengths.unsqueeze(1)).long()
    # The state at position p predicts token p + 1: that of a completion's first token is the prompt's last.
    rows = [
        begin + len(s.prompt) - 1 + s.trained.nonzero().squeeze(1) for begin, s in zip(begins, sequences, strict=True)
    ]
    cu_seqlens = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0).int()
    actions = torch.cat([s.completion[s.trained] for s in sequences])
    return Inputs(input_ids, attention_mask, position_ids, torch.cat(rows), begins + lengths - 1, actions, cu_seqlens)
