"""The sampled gradient: an unbiased estimate of the gradient by the logits with a few dozen entries per token.

The gradient by a row of logits is dense, and all but a few of its entries are tiny: off the taken token they are
|g_t| p_v, which add up to w_t = |g_t| (1 - p_a). With K samples per token and the threshold

    eps = mean over the chunk of w_t / K,

the taken token and every entry with |d| >= eps are kept as they are; a smaller one is kept with probability |d| / eps,
at the value sign(d) eps, so that its expectation is d. Sampling is systematic: with u_t one uniform number per token
and c_j the running sum of |d| / eps over the small entries of the row, entry j is kept where

    floor(c_j + u_t) > floor(c_{j-1} + u_t).

So the estimate is unbiased; a row keeps w_t / eps entries beside the taken one, to within 1; the sum of its entries is
that of the dense row to within eps; and E |estimate - d|^2 <= eps sum |d| <= |d|^2 / K over a chunk (the last step
needs |d_a| = w_t, which a soft cap or a gradient by the log-normaliser may void). ``reference.sampled_gradient`` states
it in full precision.

Two of the three matrix products become sums of a few rows: of the weight for each token, of the hidden states for each
entry of the vocabulary. The running sum is a fraction of 32 bits, whose carry is the crossing: integer sums come out
alike in any order, so a seed gives the same entries whatever the number of threads.

fp32 knows 1 - p_a only to about 2^-20, so that much is added to it: w_t is an upper bound, and the number of entries
for which ``Entries`` has room is certain. No threshold lies below ``SMALLEST``, which makes rows of zeros no case of
their own.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import (
    NOTHING,
    Head,
    Needs,
    Pull,
    Rows,
    Selection,
    Statistics,
    Sums,
    VocabularyForm,
    VocabularyWork,
)

RESOLUTION = 2.0**-20
SMALLEST = 1e-30
# Beyond w_t / eps: the taken token, the crossing that the uniform number adds, and two for rounding; and a share of
# w_t / eps that is far more than the kernels' relative error.
SPARE = 4
SLACK = 2.0**-10


class Sampling(NamedTuple):
    """The sampling that a call asks for."""

    samples: int  # K
    seed: Tensor  # int64, 0-d


class Entries:
    """The kept entries of all rows of a pass, row by row, each row's in the order of the vocabulary."""

    def __init__(self, n: int, vocab: int, sampling: Sampling, rank: int = 0) -> None:
        self._sampling, self._vocab = sampling, vocab
        self._per_row = room_per_row(sampling.samples, vocab)
        device = sampling.seed.device
        room = n * self._per_row
        self.columns = torch.full((room,), vocab, dtype=torch.int32, device=device)  # V: no entry
        self.values = torch.empty(room, dtype=torch.float32, device=device)
        self.begins = torch.zeros(n, dtype=torch.int64, device=device)
        self.counts = torch.zeros(n, dtype=torch.int32, device=device)
        self._fractions = uniform_bits(sampling.seed, n) + _spread(rank)

    def selection(self, chunk: slice, pull: Pull, logp: Tensor, scale: float) -> tuple[Pull, Selection]:
        """The inputs of the selection on these rows. A gradient that is not finite makes all of the chunk's NaN."""
        weight = upper_weights(pull.d_softmax, logp, scale)
        threshold = (weight.mean() / self._sampling.samples).clamp_min(SMALLEST).reshape(1)
        most = (weight / threshold * (1 + SLACK)).nan_to_num(0.0, 0.0).long().clamp(max=self._vocab) + SPARE
        offsets = torch.nn.functional.pad(most.cumsum(0), (1, 0)) + chunk.start * self._per_row
        self.begins[chunk] = offsets[:-1]
        poison = threshold - threshold
        pull = pull._replace(d_action=pull.d_action + poison, d_softmax=pull.d_softmax + poison)
        return pull, Selection(
            threshold, self._fractions[chunk], offsets, self.columns, self.values, self.counts[chunk]
        )

    def by_token(self) -> Sums:
        """The sum over each token's entries."""
        return Sums(self.begins, self.begins + self.counts, self.columns, self.values)

    def by_column(self) -> Sums:
        """The sum over the entries in each column, in the order of the tokens; ``places`` holds tokens."""
        columns, order = torch.sort(self.columns, stable=True)
        bounds = torch.searchsorted(columns, torch.arange(self._vocab + 1, dtype=torch.int32, device=columns.device))
        tokens = torch.searchsorted(self.begins, order, right=True, out_int32=True) - 1
        return Sums(bounds[:-1].contiguous(), bounds[1:].contiguous(), tokens, self.values[order])


class Sampled(VocabularyWork):
    """The work of a pass with a sampled gradient. ``form`` holds the logits and selects among their gradients.

    ``logp``, fp32 [n], holds the log-probabilities of a chunk by the time that its gradients are asked for. The logits
    lie in the memory that is to become the weight's gradient, which is written last, where enough rows fit
    in (``chunking.rows_inside``).
    """

    def __init__(
        self,
        form: type[VocabularyForm],
        backend: ModuleType,
        rows: Rows,
        head: Head,
        needs: Needs,
        sampling: Sampling,
        logp: Tensor,
        *,
        keep: bool,
        workspace_bytes: int | None,
    ) -> None:
        self._backend, self._rows, self._head, self._needs, self._logp = backend, rows, head, needs, logp
        self.weight = head.weight.new_empty(head.weight.shape, dtype=head.gradient_dtype) if needs.weight else None
        self.hidden: Tensor | None = None
        self.bias: Tensor | None = None
        self._form = form(backend, rows, head, NOTHING, keep=keep, workspace_bytes=workspace_bytes, memory=self.weight)
        self.chunk_rows = self._form.chunk_rows
        rank = 0 if head.shard is None else head.shard.rank
        self._entries = Entries(rows.actions.numel(), head.weight.shape[0], sampling, rank)

    def statistics(self, chunk: slice, out: Statistics) -> None:
        self._form.statistics(chunk, out)

    def gradients(self, chunk: slice, pull: Pull) -> None:
        """Selects the entries of the chunk's gradient; ``finish`` makes the head's gradients of them."""
        pull, selection = self._entries.selection(chunk, pull, self._logp[chunk], self._head.scale)
        self._form.select(chunk, pull, selection)

    def finish(self) -> None:
        counts = self._entries.counts.float()
        self.entries_per_token = counts.mean() if counts.numel() else counts.sum()
        if self._needs.hidden:
            self.hidden = self._hidden_gradient()
        if self._needs.weight or self._needs.bias:
            self._column_gradients(self._entries.by_column())

    def _hidden_gradient(self) -> Tensor:
        rows, weight = self._rows, self._head.weight
        by_row = weight.new_empty(rows.actions.numel(), weight.shape[1], dtype=self._head.hidden_dtype)
        self._backend.weighted_sums(self._entries.by_token(), weight.contiguous(), by_row)
        if rows.positions is None:
            return by_row
        total = rows.hidden.new_zeros(rows.hidden.shape)
        rows.put(total, slice(0, by_row.shape[0]), by_row)
        return total

    def _column_gradients(self, sums: Sums) -> None:
        """Those of the bias and the weight, whose memory holds the logits until here."""
        rows, sum_up = self._rows, self._backend.weighted_sums
        if self._needs.bias:
            ones = torch.ones(rows.actions.numel(), 1, dtype=torch.float32, device=self._head.weight.device)
            bias = ones.new_empty(self._head.weight.shape[0])
            sum_up(sums, ones, bias[:, None])
            self.bias = bias
        if self.weight is not None:
            if rows.positions is not None:
                sums = sums._replace(places=rows.positions[sums.places].int())
            sum_up(sums, rows.hidden.contiguous(), self.weight)


def room_per_row(samples: int, vocab: int) -> int:
    """Entries per row that are certain to suffice, on average over a chunk."""
    return min(samples + int(samples * 2 * SLACK) + 1, vocab) + SPARE


def upper_weights(d_softmax: Tensor, logp: Tensor, scale: float) -> Tensor:
    """w_t, fp32 [n]: an upper bound of the sum of |d| over a row off the taken token."""
    return d_softmax.abs() * scale * (RESOLUTION - torch.expm1(logp.clamp(max=0.0)))


def uniform_bits(seed: Tensor, n: int) -> Tensor:
    """int32 [n]: 32 random bits for each row, a function of the seed and the row alone, on any device.

    They are the upper half of SplitMix64 (Steele, Lea, Flood 2014): a counter in steps of an odd constant, mixed by
    two multiplications. Integers wrap.
    """
    x = (torch.arange(1, n + 1, dtype=torch.int64, device=seed.device) + _mixed(seed)) * -0x61C8864680B583EB
    return (_mixed(x) >> 32).int()


def _spread(rank: int) -> int:
    """In 2^-32, as int32: how far the fractions of ranks that share a head lie from those of the first. Steps by the
    golden ratio spread any number of them.
    """
    return (rank * 0x9E3779B9 + 2**31) % 2**32 - 2**31


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x shifted right, zeros coming in from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
