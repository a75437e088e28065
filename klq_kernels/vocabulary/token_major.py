"""A chunk of logits stored token by token, [rows, V]: the form for GPUs, and for plain PyTorch.

One buffer holds the logits of a chunk. GEMM 1 fills it, ``row_stats`` reads it, ``row_grad`` turns it into its own
gradient in place, and GEMM 2 and 3 read that. Logits in fp32 become gradients in the 16 bits of the products, in the
first half of each row.

A GEMM adds a bias for nothing where PyTorch gives it to cuBLAS with the product: to logits of the operands' dtype, in
a buffer without padding. Elsewhere PyTorch writes the bias over the whole buffer first, and the GEMM reads it back. So
rows are not padded under a bias where they begin at 16 bytes anyway; and to fp32 logits a backend with ``ADDS_BIAS``
adds it as its row operations read them. (16-bit logits without their bias would be rounded where the sum is not.)
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunking, products
from .chunks import (
    Head,
    LossShape,
    Needs,
    Pull,
    Residuals,
    Rows,
    Selection,
    States,
    Statistics,
    Terms,
    VocabularyForm,
    as_dtype,
    empty_gradients,
    rows_of,
)


class Logits:
    """Logits of a head, a chunk of rows at a time in one buffer, and the head's gradients by theirs.

    ``hidden``, ``weight`` and ``bias`` are the gradients, as ``VocabularyWork`` has them.
    """

    def __init__(
        self,
        backend: ModuleType,
        states: States,
        head: Head,
        needs: Needs,
        *,
        workspace_bytes: int | None,
        memory: Tensor | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        """``chunk_rows``: where they are decided elsewhere already."""
        self._backend, self._states, self._head = backend, states, head
        n = states.n
        (vocab, width), dtype, device = head.weight.shape, head.logits_dtype, head.weight.device
        room = chunking.rows_for_accumulator(width, dtype, head.gradient_dtype, device) if needs.weight else 0
        # Padding helps kernels that load 16 bytes at a time. Where nothing needs it there must be none: with AMX, the
        # GEMM of a CPU multiplies the memory behind a row of its left operand by 0, and a NaN there stays a NaN.
        stride = self._stride(vocab)
        # (Kernels made for a GPU run on a CPU in tests: there the padding is 0.)
        padded_on_cpu = stride != vocab and device.type == "cpu"
        inside = 0
        if memory is not None and not padded_on_cpu:
            inside = head.rows_for_all(
                lambda vocab: chunking.rows_inside(
                    n, self._stride(vocab) * dtype.itemsize, vocab * width * memory.itemsize
                )
            )
        if memory is not None and inside:
            self.chunk_rows = inside
            self._buffer = as_dtype(memory, dtype)[: inside * stride].view(inside, stride)[:, :vocab]
        else:
            make = head.weight.new_zeros if padded_on_cpu else head.weight.new_empty
            self.chunk_rows = chunk_rows or head.rows_for_all(
                lambda vocab: chunking.chunk_rows(n, vocab, dtype, device, workspace_bytes, room=room)
            )
            self._buffer = make(self.chunk_rows, stride, dtype=dtype)[:, :vocab]
        self._needs = needs
        # whose gradient of hidden is the product itself
        one_chunk = 0 < self.chunk_rows == states.hidden.shape[0] and vocab > 0
        apart = needs._replace(hidden=needs.hidden and not one_chunk)
        self.hidden, self.weight, self.bias = empty_gradients(states, head, apart)
        self._first = True
        self._bias = head.bias  # that the product adds

    def _stride(self, vocab: int) -> int:
        as_it_is = self._head.bias is not None and vocab % 16 == 0
        return chunking.row_stride(vocab) if self._backend.PADS_ROWS and not as_it_is else vocab

    def project(self, chunk: slice) -> Tensor:
        """GEMM 1: raw logits of these rows (before softcap and temperature), valid until the next call."""
        self._hidden = self._states.take(chunk)
        self._logits = products.project(
            self._hidden, self._head.weight, self._bias, rows_of(self._buffer, slice(0, self._hidden.shape[0]))
        )
        return self._logits

    @property
    def gradient(self) -> Tensor:
        """Room for the gradient by the logits, in their memory: in the dtype of the products."""
        return self._logits.view(self._head.weight.dtype)[:, : self._logits.shape[1]]

    def multiply(self, chunk: slice, dlogits: Tensor) -> None:
        """GEMM 2 and 3. The gradient of the bias is not theirs: it is a sum over rows (``portable.row_grad``)."""
        if self._needs.hidden:
            self._multiply_back(chunk, dlogits)
        if self.weight is not None:
            products.accumulate(self.weight, dlogits, self._hidden, first=self._first)
        self._first = False

    def _multiply_back(self, chunk: slice, dlogits: Tensor) -> None:
        """GEMM 2. On a GPU it writes its rows where they belong, unless they are scattered."""
        total, place = self.hidden, None
        if total is not None and total.is_cuda and self._states.positions is None:
            place = rows_of(total, chunk)
        product = products.project_back(dlogits, self._head.weight, self._head.hidden_dtype, place)
        if total is None:
            self.hidden = product
        elif place is None:
            self._states.put(total, chunk, product)


class TokenMajor(Logits, VocabularyForm):
    """For a backend with the row operations."""

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
        super().__init__(backend, rows.states, head, needs, workspace_bytes=workspace_bytes, memory=memory)
        self._actions, self._keep = rows.actions, keep
        self._head_options: dict[str, Any] = {"scale": head.scale, "softcap": head.softcap}
        stride = self._buffer.stride(0)
        product_adds = head.logits_dtype == head.weight.dtype and stride == head.weight.shape[0]
        if head.bias is not None and backend.ADDS_BIAS and head.logits_dtype == torch.float32 and not product_adds:
            self._bias = None
            self._head_options["bias"] = F.pad(head.bias, (0, stride - head.bias.numel()))

    def statistics(self, chunk: slice, out: Statistics) -> None:
        self.project(chunk)
        self._backend.row_stats(self._logits, rows_of(self._actions, chunk), out, **self._head_options)

    def gradients(self, chunk: slice, pull: Pull) -> None:
        if not self._keep:
            self.project(chunk)
        dlogits = self.gradient
        self._backend.row_grad(
            self._logits, rows_of(self._actions, chunk), pull, dlogits, self.bias, **self._head_options
        )
        self.multiply(chunk, dlogits)

    def select(self, chunk: slice, pull: Pull, selection: Selection) -> None:
        if not self._keep:
            self.project(chunk)
        self._backend.row_select(self._logits, rows_of(self._actions, chunk), pull, selection, **self._head_options)

    def update(
        self,
        chunk: slice,
        found: Statistics,
        terms: Terms,
        residuals: Residuals,
        *,
        grad_scale: Tensor,
        shape: LossShape,
    ) -> bool:
        updates = getattr(self._backend, "updates", None)  # only the Triton backend has this, and row_update
        if (
            updates is None
            or self.bias is not None  # whose gradient ``row_grad`` sums: to read it again saves nothing
            or "bias" in self._head_options
            or not updates(self._buffer, softcap=self._head.softcap, entropy=found.entropy is not None)
        ):
            return False
        self.project(chunk)
        self._backend.row_update(
            self._logits, rows_of(self._actions, chunk), terms, found, residuals, grad_scale=grad_scale, shape=shape,
            scale=self._head.scale,
        )  # fmt: skip
        self.multiply(chunk, self._logits)
        return True
