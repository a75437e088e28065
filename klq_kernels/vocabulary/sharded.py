"""A head whose vocabulary is split over the processes of a group: each holds some rows of the weight, in rank order.

Every rank has all tokens. On a chunk of them it computes the logits of its own rows alone, and from these four numbers
for each token: top_r, log_total_r, logp_r and entropy_r, as if its rows were the whole vocabulary
(``portable.row_stats``). One all-gather shares them, and every rank merges them alike:

    top       = max_r top_r
    log_total = log sum_r exp(scale (top_r - top) + log_total_r)
    log w_r   = scale (top_r - top) + log_total_r - log_total       w_r: the share of rank r in the softmax
    logp      = logp_r + log w_r                                    on the rank r that holds the taken token
    entropy   = sum_r w_r (entropy_r - log w_r)

With these each rank forms the gradient by its own logits, by its rows of the weight and by its part of the bias alone.
The gradient by the hidden states is a sum over ranks: an all-reduce in fp32 for each chunk, beside the work on the
next one.

All ranks walk the same chunks: each has as many rows as every rank can hold. A rank without rows of the weight takes
part in the collectives and does nothing else.

A sampled gradient is sampled by each rank on its own, with the common threshold. It stays unbiased and within its
bound; the entries of a row add up to those of the dense one to within a threshold per rank; and a rank keeps one entry
more for each token whose taken one it does not hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .chunks import Head, Needs, Pull, Rows, Statistics, VocabularyWork
from .collectives import add_up, all_gather


class Sharded(VocabularyWork):
    """The work on this rank's rows of the head, and the collectives that complete it.

    ``local`` makes the work on the rows of one rank; it is given the tokens in that rank's terms, and the head.
    """

    def __init__(
        self, local: Callable[[Rows, Head], VocabularyWork], rows: Rows, head: Head, needs: Needs, *, sampled: bool
    ) -> None:
        assert head.shard is not None
        self._rows, self._head, self._shard, self._needs, self._sampled = rows, head, head.shard, needs, sampled
        self._has_rows = head.weight.shape[0] > 0  # where it has none, the work below has nothing to do
        self._owner = head.shard.owner(rows.actions)
        self._work = local(self._local_rows(), head)
        self.chunk_rows = self._work.chunk_rows
        self._sums: list[dist.Work] = []
        self.hidden: Tensor | None = None

    def _local_rows(self) -> Rows:
        """All valid rows. A token of another rank becomes one of ours, whose own gradient ``gradients`` takes away."""
        n, entries = self._rows.actions.numel(), max(self._head.weight.shape[0], 1)
        actions = (self._rows.actions - self._shard.first).clamp(0, entries - 1)
        return Rows(self._rows.take(slice(0, n)), None, actions)

    def statistics(self, chunk: slice, out: Statistics) -> None:
        fields = [vector for vector in out if vector is not None]
        ours = out.top.new_full((len(fields), out.top.numel()), -torch.inf)
        if self._has_rows:
            self._work.statistics(chunk, Statistics(*ours, *[None] * (len(out) - len(fields))))
        merge(all_gather(ours, self._shard.group).unbind(1), self._owner[chunk], out, scale=self._head.scale)

    def gradients(self, chunk: slice, pull: Pull) -> None:
        if self._has_rows:
            elsewhere = self._owner[chunk] != self._shard.rank
            self._work.gradients(chunk, pull._replace(d_action=pull.d_action.masked_fill(elsewhere, 0.0)))
        if self._needs.hidden and not self._sampled:
            self._add_up(chunk)

    def finish(self) -> None:
        self._work.finish()
        self.weight, self.bias = self._work.weight, self._work.bias
        if self._sampled:
            self.entries_per_token = self._work.entries_per_token
            assert self.entries_per_token is not None
            add_up(self.entries_per_token, self._shard.group).wait()
        if self._needs.hidden:
            self._finish_hidden()

    def _finish_hidden(self) -> None:
        everything = slice(0, self._rows.actions.numel())
        if self._sampled:
            self._add_up(everything)
        for running in self._sums:
            running.wait()
        assert self._work.hidden is not None
        total = self._work.hidden.to(self._rows.hidden.dtype)
        if self._rows.positions is None:
            self.hidden = total
        else:
            self.hidden = self._rows.hidden.new_zeros(self._rows.hidden.shape)
            self._rows.put(self.hidden, everything, total)

    def _add_up(self, chunk: slice) -> None:
        """Starts the sum over ranks of these rows of the gradient by the hidden states, in place."""
        assert self._work.hidden is not None
        self._sums.append(add_up(self._work.hidden[chunk], self._shard.group))


def merge(everyones: tuple[Tensor, ...], owner: Tensor, out: Statistics, *, scale: float) -> None:
    """Writes the statistics over the whole vocabulary.

    Args:
        everyones: fp32 [ranks, n] each: top, log_total, logp and, where asked for, entropy of each rank's part. top is
            -inf where a part has no entry that can be taken, and then the others mean nothing.
        owner: int64 [n]: the rank that holds the taken token; the number of ranks where none does.
    """
    tops, rests, logps, *entropies = (vector.double() for vector in everyones)
    top = tops.amax(0)
    without = (tops == -torch.inf) & (top != -torch.inf)
    log_share = (scale * (tops - top) + rests).masked_fill(without, -torch.inf)
    log_total = log_share.logsumexp(0)
    log_share -= log_total
    out.top.copy_(top)
    out.log_total.copy_(log_total)
    known = owner < tops.shape[0]
    row = torch.where(known, owner, 0)[None]
    logp = (logps.masked_fill(without, 0.0) + log_share).gather(0, row)[0]
    out.logp.copy_(logp.masked_fill(~known, torch.nan))
    if out.entropy is not None:
        parts = log_share.exp() * (entropies[0] - log_share)
        out.entropy.copy_(parts.masked_fill(log_share == -torch.inf, 0.0).sum(0))
