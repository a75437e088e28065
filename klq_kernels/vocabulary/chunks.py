"""The inputs of a pass over the vocabulary (the head, the valid rows, the gradients wanted, chunks of rows), its work
on each chunk (``VocabularyWork``), and the bundles of vectors that a backend's operations take.

The vectors of a bundle are contiguous [n], and fp32 but for those of ``ScanTerms``. They hold a number for each row of
a pass, or of the chunk that ``part`` cuts out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor


class Statistics(NamedTuple):
    """Statistics of each row of logits (``portable.row_stats``). ``entropy`` is None unless it was asked for."""

    top: Tensor
    log_total: Tensor
    logp: Tensor
    entropy: Tensor | None


class Pull(NamedTuple):
    """The inputs of the gradient by a row of logits (``portable.row_grad``)."""

    top: Tensor
    log_total: Tensor
    d_action: Tensor
    d_softmax: Tensor
    d_entropy: Tensor | None = None
    entropy: Tensor | None = None


class Terms(NamedTuple):
    """The inputs of a token's loss. On-policy, where logp - old_logp = V - old_V = 0, the old ones are None."""

    logp: Tensor
    values: Tensor
    old_logp: Tensor | None
    old_values: Tensor | None
    advantages: Tensor
    weights: Tensor | None


class Residuals(NamedTuple):
    """A token's weighted loss, and its derivatives at the gradient scale."""

    losses: Tensor
    d_logp: Tensor
    d_values: Tensor


class Selection(NamedTuple):
    """The further inputs, and the results, of a selection among the gradients by n rows of logits (``sampling``)."""

    threshold: Tensor  # fp32 [1]
    fractions: Tensor  # int32 [n]: where each row's running sum begins, in 2^-32; a backend may keep the sum in it
    offsets: Tensor  # int64 [n + 1]: row t may fill offsets[t] .. offsets[t + 1] - 1 of the next two
    columns: Tensor  # int32 [room], written: an entry's place in the vocabulary, ascending in a row
    values: Tensor  # fp32 [room], written
    counts: Tensor  # int32 [n], 0 before, written: how many entries each row has


class Sums(NamedTuple):
    """Weighted sums of rows: out[i] = sum of values[e] source[places[e]] over e in begins[i] .. ends[i] - 1."""

    begins: Tensor  # int64 [rows]
    ends: Tensor  # int64 [rows]
    places: Tensor  # int32 [entries]
    values: Tensor  # fp32 [entries]


class Divergence(NamedTuple):
    """The divergence of each row's two softmaxes, and what each is normalised by (``portable.row_kl``)."""

    top: Tensor
    log_total: Tensor
    ref_top: Tensor
    ref_log_total: Tensor
    kl: Tensor


class ScanTerms(NamedTuple):
    """The inputs of a token's lambda-error, in any floating dtype; all but the values may be absent."""

    logp: Tensor | None
    ref_logp: Tensor | None
    values: Tensor
    rewards: Tensor | None
    trace: Tensor | None


class LossShape(NamedTuple):
    """The hyperparameters of ``reference.klq_residual_loss``."""

    tau: float
    alpha: float
    loss_type: str
    huber_delta: float
    value_clip: float
    log_ratio_clip: float


class Pair(NamedTuple):
    """How the logits of a policy and of its reference become softmaxes, and which divergence of the two is meant."""

    scale: float  # 1 / temperature
    softcap: float | None
    ref_scale: float
    ref_softcap: float | None
    reverse: bool  # KL(reference || policy) instead of KL(policy || reference)


Bundle = TypeVar("Bundle", Statistics, Pull, Terms, Residuals, ScanTerms, Sums, Divergence)


def each(bundle: Bundle, change: Callable[[Tensor], Tensor]) -> Bundle:
    """The bundle with ``change`` made to each vector that is there."""
    return type(bundle)._make(None if vector is None else change(vector) for vector in bundle)


def part(bundle: Bundle, chunk: slice) -> Bundle:
    """These rows of each vector in the bundle."""
    return each(bundle, lambda vector: rows_of(vector, chunk))


def rows_of(tensor: Tensor, chunk: slice) -> Tensor:
    """These rows of a tensor: itself where they are all, since a view takes the host a microsecond."""
    return tensor if chunk.start == 0 and chunk.stop == tensor.shape[0] else tensor[chunk]


class Shard(NamedTuple):
    """This rank's place in a head whose rows are split over the ranks of a group, in their order (``sharded``)."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]  # rows of each rank; some may be 0

    @property
    def first(self) -> int:
        """The token of this rank's first row."""
        return sum(self.sizes[: self.rank])

    def owner(self, actions: Tensor) -> Tensor:
        """int64, the shape of ``actions``: the rank that holds each token, and the number of ranks where none does."""
        ends = torch.tensor(list(accumulate(self.sizes)), device=actions.device)
        owner = torch.bucketize(actions, ends, right=True)
        return owner.masked_fill(actions < 0, len(self.sizes))


class Head(NamedTuple):
    """The linear head: z = softcap(hidden @ weight.T + bias) * scale, with scale = 1 / temperature."""

    weight: Tensor  # [V, H], in the dtype of the products
    bias: Tensor | None  # [V], in ``logits_dtype``
    scale: float
    softcap: float | None
    gradient_dtype: torch.dtype  # what the weight's gradient adds up in (``chunking.weight_gradient_dtype``)
    logits_dtype: torch.dtype  # what the first product writes: that of the products, or on a GPU fp32
    shard: Shard | None = None  # where ``weight`` and ``bias`` are one rank's rows

    @property
    def hidden_dtype(self) -> torch.dtype:
        """The dtype of the gradient by the hidden states: a rank's part is rounded only after the sum over ranks."""
        return self.weight.dtype if self.shard is None else torch.float32

    def rows_for_all(self, rows_for: Callable[[int], int]) -> int:
        """The least of ``rows_for(V)`` over the ranks that have rows of the head: all must walk the same chunks."""
        sizes = (self.weight.shape[0],) if self.shard is None else self.shard.sizes
        return min(rows_for(vocab) for vocab in sizes if vocab)


class States(NamedTuple):
    """The hidden states of the valid rows of a call: where they lie, and how many there are."""

    hidden: Tensor  # [M, H], the caller's
    positions: Tensor | None  # int64 [n] into hidden, None for all

    @property
    def n(self) -> int:
        return self.hidden.shape[0] if self.positions is None else self.positions.numel()

    def take(self, chunk: slice) -> Tensor:
        """The hidden states of these rows, contiguous."""
        if self.positions is None:
            return rows_of(self.hidden, chunk).contiguous()
        return self.hidden.index_select(0, self.positions[chunk])

    def put(self, total: Tensor, chunk: slice, values: Tensor) -> None:
        """Writes these rows of ``total``, [M, H], at the caller's positions."""
        if self.positions is None:
            total[chunk] = values
        else:
            total.index_copy_(0, self.positions[chunk], values)


class Rows(NamedTuple):
    """The valid rows of a call: their hidden states, and what was taken there."""

    hidden: Tensor  # [M, H], the caller's
    positions: Tensor | None  # int64 [n] into hidden, None for all
    actions: Tensor  # int64 [n]

    @property
    def states(self) -> States:
        return States(self.hidden, self.positions)

    def take(self, chunk: slice) -> Tensor:
        """``States.take``."""
        return self.states.take(chunk)

    def put(self, total: Tensor, chunk: slice, values: Tensor) -> None:
        """``States.put``."""
        self.states.put(total, chunk, values)


class Chosen(NamedTuple):
    """The entries of the vocabulary that are wanted of each valid row: k ids, each with ``atoms`` rows of the head."""

    states: States
    ids: Tensor  # int64 [n, k]
    atoms: int


class Needs(NamedTuple):
    """The gradients that are needed."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING = Needs(hidden=False, weight=False, bias=False)


class VocabularyWork(Protocol):
    """The vocabulary's part of a pass, on chunks of at most ``chunk_rows`` rows; it sums the head's gradients.

    ``weight`` adds up in ``head.gradient_dtype`` and ``bias`` in fp32; ``hidden`` gets each row once, at the caller's
    position, and is 0 elsewhere. They are None where they are not needed. Bundles are those of the chunk.
    """

    chunk_rows: int
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    entries_per_token: Tensor | None = None  # fp32, 0-d: how many a sampled gradient keeps, on average

    def statistics(self, chunk: slice, out: Statistics) -> None:
        """GEMM 1 and the statistics of each row (``portable.row_stats``)."""

    def gradients(self, chunk: slice, pull: Pull) -> None:
        """Adds the chunk's part of the head's gradients: ``portable.row_grad``, GEMM 2 and GEMM 3."""

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
        """The two above at once, and the loss between them, for terms that hold the lambda-errors already: where
        the backend can, reading the logits once less. False where it cannot, with nothing done.
        """
        return False

    def finish(self) -> None:
        """After the last chunk: whatever is left to do before the gradients are there."""


class VocabularyForm(VocabularyWork, Protocol):
    """The work in one of the two forms, by how a chunk of logits is stored: ``token_major``, ``vocabulary_major``.

    With ``keep`` the logits of ``statistics`` are those that ``gradients`` and ``select`` continue with; otherwise they
    are computed again. ``memory`` may hold them, where enough rows fit in (``chunking.rows_inside``).
    """

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
    ) -> None: ...

    def select(self, chunk: slice, pull: Pull, selection: Selection) -> None:
        """Writes the kept entries of the chunk's gradient by the logits (``portable.row_select``)."""


def slices(n: int, size: int) -> list[slice]:
    """The slices that cut n rows, or entries, into pieces of at most ``size``, in order."""
    return [slice(start, min(start + size, n)) for start in range(0, n, max(size, 1))]


def as_dtype(memory: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a contiguous tensor, flat, as numbers of this dtype."""
    flat = memory.view(-1)
    whole = flat.numel() * flat.itemsize // dtype.itemsize * dtype.itemsize
    return flat[: whole // flat.itemsize].view(dtype)


def empty_gradients(states: States, head: Head, needs: Needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Buffers for the gradients of (hidden, weight, bias): 0 wherever no chunk will write, uninitialised elsewhere."""
    vocab, width = head.weight.shape
    device = head.weight.device
    rowless = states.n == 0 or vocab == 0
    make = torch.zeros if rowless or states.positions is not None else torch.empty
    hidden = make(states.hidden.shape, dtype=head.hidden_dtype, device=device) if needs.hidden else None
    make = torch.zeros if rowless else torch.empty
    weight = make(vocab, width, dtype=head.gradient_dtype, device=device) if needs.weight else None
    bias = torch.zeros(vocab, dtype=torch.float32, device=device) if needs.bias else None
    return hidden, weight, bias
