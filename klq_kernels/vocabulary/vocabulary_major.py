"""A chunk of logits stored entry by entry of the vocabulary, [V, rows]: the form for CPUs.

    for strip of the vocabulary:                     logits[strip] = W[strip] @ hidden.T         GEMM 1
                                                     running maximum and sum of exponentials     strip_stats
    for strip of the vocabulary, last to first:      g = dlogp (onehot(action) - softmax)        strip_grad
                                                     d_hidden += g.T @ W[strip]                  GEMM 2
                                                     d_weight[strip] = g @ hidden                GEMM 3

The vocabulary is the long side of all three products. Stored this way, W is the left operand of the first and g of the
third as they lie in memory, and what a matrix unit wants rearranged is the small hidden matrix; the other way round a
CPU's GEMM rearranges W, and the logits, on every call. The second product wants g the other way: ``strip_grad`` writes
it a second time, turned, while it is at hand.

A strip stays in cache between its steps. Where the logits need not survive until the gradient (scoring, or the backward
of log-probabilities, which knows the normaliser) a strip is all there ever is of them. Where they do, they lie in the
memory that is to become the weight's gradient if they fit: strips go from last to first, so d_weight[strip] only ever
overwrites logits that are done with. Each strip of the weight's gradient is then written once, in its own dtype.

16-bit products of a CPU without 16-bit instructions are emulated; there strips are fp32 (``chunking.widens``).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import chunking
from .chunks import Head, Needs, Pull, Rows, Selection, Statistics, VocabularyForm, as_dtype, empty_gradients, slices
from .products import add_product


class VocabularyMajor(VocabularyForm):
    """For a backend with the operations on strips."""

    def __init__(
        self,
        backend: ModuleType,
        rows: Rows,
        head: Head,
        needs: Needs,
        *,
        keep: bool,
        workspace_bytes: int | None,
        memory: Tensor | None = None,
    ) -> None:
        self._backend, self._rows, self._head = backend, rows, head
        n = rows.actions.numel()
        vocab, width = head.weight.shape
        stored, device = head.weight.dtype, head.weight.device
        self._computed = torch.float32 if chunking.widens(stored, device) else stored
        self.hidden, self.weight, self.bias = empty_gradients(rows.states, head, needs)
        room = chunking.rows_in_one_chunk(width, stored, head.gradient_dtype, workspace_bytes) if needs.weight else 0
        self.chunk_rows = head.rows_for_all(
            lambda vocab: chunking.strip_chunk_rows(n, vocab, stored, device, workspace_bytes, keep=keep, room=room)
        )
        inside = self.weight if keep and n <= chunking.rows_in_gradient(width, stored, head.gradient_dtype) else None
        if keep and memory is not None:
            fit = head.rows_for_all(
                lambda vocab: chunking.rows_inside(n, vocab * stored.itemsize, vocab * width * memory.itemsize)
            )
            self.chunk_rows, inside = (fit, memory) if fit else (self.chunk_rows, None)
        size = chunking.strip_entries(self.chunk_rows, vocab, self._computed, workspace_bytes)
        self._strips = slices(vocab, size)
        own = vocab * self.chunk_rows if keep and inside is None else 0
        # Flat buffers, of which each chunk takes what it needs.
        self._kept = None if inside is None else as_dtype(inside, stored)
        self._strip = self._turned = self._rounded = None
        if own:
            self._kept = head.weight.new_empty(own)
        if not keep and self._computed != stored:
            self._rounded = head.weight.new_empty(size * self.chunk_rows)
        if not own or self._computed != stored:
            self._strip = head.weight.new_empty(size * self.chunk_rows, dtype=self._computed)
        if needs.hidden and self._computed != torch.float32:
            self._turned = head.weight.new_empty(size * self.chunk_rows)
        for buffer in (self.weight, memory, self._kept if own else None, self._strip, self._turned):
            if buffer is not None:
                backend.populate(buffer)
        self._first = True

    def statistics(self, chunk: slice, out: Statistics) -> None:
        top, log_total, logp, entropy = out
        actions = self._rows.actions[chunk]
        self._hidden = self._rows.take(chunk).to(self._computed)
        top.fill_(-torch.inf)
        total, taken = torch.zeros_like(top), torch.full_like(top, torch.nan)
        weighted = None if entropy is None else torch.zeros_like(top)
        for strip in self._strips:
            logits = self._project(strip)
            self._backend.strip_stats(
                logits, strip.start, actions, top, total, weighted, taken, scale=self._head.scale,
                softcap=self._head.softcap,
            )  # fmt: skip
        torch.log(total, out=log_total)
        torch.sub(taken.sub_(top).mul_(self._head.scale), log_total, out=logp)
        if entropy is not None and weighted is not None:
            torch.sub(log_total, weighted.div_(total), out=entropy)

    def gradients(self, chunk: slice, pull: Pull) -> None:
        actions = self._rows.actions[chunk]
        if self._kept is None:
            self._hidden = self._rows.take(chunk).to(self._computed)
        n = self._hidden.shape[0]
        d_hidden = None if self.hidden is None else torch.empty(self._hidden.shape, dtype=torch.float32)
        for strip in reversed(self._strips):
            entries = strip.stop - strip.start
            kept = None if self._kept is None else self._stored(strip)
            logits = self._project(strip) if kept is None else kept
            dlogits = logits if self._strip is None else _matrix(self._strip, entries, n)
            turned = None if self._turned is None else _matrix(self._turned, n, entries)
            self._backend.strip_grad(
                logits, strip.start, actions, pull, dlogits, turned, scale=self._head.scale, softcap=self._head.softcap
            )
            if d_hidden is not None:
                by_token = dlogits.T if turned is None else turned
                add_product(d_hidden, by_token, self._weight(strip), first=strip is self._strips[-1])
            if self.weight is not None:
                add_product(self.weight[strip], dlogits, self._hidden, first=self._first)
            if self.bias is not None:
                self.bias[strip] += dlogits.sum(1, dtype=torch.float32)
        if self.hidden is not None and d_hidden is not None:
            self._rows.put(self.hidden, chunk, d_hidden.to(self.hidden.dtype))
        self._first = False

    def select(self, chunk: slice, pull: Pull, selection: Selection) -> None:
        if self._kept is None:
            self._hidden = self._rows.take(chunk).to(self._computed)
        actions = self._rows.actions[chunk].clamp(0, self._head.weight.shape[0] - 1)  # as in ``portable.row_select``
        for strip in self._strips:
            logits = self._project(strip) if self._kept is None else self._stored(strip)
            self._backend.strip_select(
                logits, strip.start, actions, pull, selection, scale=self._head.scale, softcap=self._head.softcap
            )

    def _stored(self, strip: slice) -> Tensor | None:
        """Where a strip's logits are in the model's dtype; None where the products run in it, and nothing is kept."""
        entries, n = strip.stop - strip.start, self._hidden.shape[0]
        if self._kept is not None:
            return _matrix(self._kept[strip.start * n :], entries, n)
        return None if self._rounded is None else _matrix(self._rounded, entries, n)

    def _weight(self, strip: slice) -> Tensor:
        """Contiguous, like every left operand here (``token_major`` says why)."""
        return self._head.weight[strip].to(self._computed).contiguous()

    def _project(self, strip: slice) -> Tensor:
        """Raw logits of a strip (before softcap and temperature), in the model's dtype, whatever the products' is: the
        gradient of a likely token is 1 - p, so its logits must be those that ``top`` was found in, to the last bit.
        """
        stored = self._stored(strip)
        if stored is not None and stored.dtype == self._computed:
            logits = stored
        else:
            assert self._strip is not None
            logits = _matrix(self._strip, strip.stop - strip.start, self._hidden.shape[0])
        if self._head.bias is None:
            torch.mm(self._weight(strip), self._hidden.T, out=logits)
        else:
            bias = self._head.bias[strip, None].to(self._computed)
            torch.addmm(bias, self._weight(strip), self._hidden.T, out=logits)
        return logits if stored is None or stored is logits else stored.copy_(logits)


def _matrix(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The first elements of a flat buffer as a matrix."""
    return buffer[: rows * columns].view(rows, columns)
