"""Bytes per step and rank that collectives move.

With S the bytes of the whole tensor, gathered or reduced, among n ranks, a rank sends (and receives)

    all-gather, reduce-scatter    S (n - 1) / n
    all-reduce                    2 S (n - 1) / n       one after the other

as rings do, and as no algorithm without sums in the network can undercut. What padding adds, where n does not divide a
weight, is left out.

    FSDP2    gathers every layer for its forward and again for its backward; embeddings and head, which stay whole in
             between, once. Gradients are reduced in the dtype of the products, as accelerate has it.
    ZeRO     stages 1 and 2 reduce gradients to their owners and gather the new weights (Rajbhandari et al., arXiv
             1910.02054); stage 3 gathers all weights twice.
    DDP      reduces the gradients of all trained parameters, in the dtype of the parameters.
    tp       reduces the outputs of attention and MLP, and the embeddings, in forward; in backward the gradient by the
             input of each of q, k, v, gate and up, as torch.distributed.tensor.parallel and transformers do.
    cp       gathers keys and values in forward, recomputation and backward, and reduces their gradients.
    head     one that is split shares 12 bytes a token and rank, and sums the gradient by the hidden states in fp32
             (``vocabulary.sharded``); split under FSDP2 it gathers the tokens first (``call.tokens``).
"""

from __future__ import annotations

from typing import NamedTuple

from .memory import share
from .run import Run
from .shapes import Model

STATISTICS = 12  # bytes: top, log_total and logp of a token in fp32
PER_TOKEN = 28  # bytes that come with a token's hidden states: its action, value, three targets, reference log-prob


class Move(NamedTuple):
    """``size`` S bytes among ``ranks`` that lie ``stride`` apart; ``kind`` 'host' is a copy between GPU and host."""

    name: str
    kind: str
    size: int
    ranks: int = 1
    stride: int = 1
    overlaps: bool = False  # whether the engine runs it beside the products

    @property
    def sent(self) -> int:
        """Bytes that a rank sends."""
        if self.kind == "host":
            return self.size
        return (2 if self.kind == "all-reduce" else 1) * self.size * (self.ranks - 1) // self.ranks


def traffic(model: Model, run: Run) -> list[Move]:
    """All collectives of a step of one micro-batch: forward, backward and optimiser."""
    moves = [*_weights(model, run), *_activations(model, run), *_head(model, run)]
    return [move for move in moves if move.sent]


def scoring(model: Model, run: Run) -> list[Move]:
    """Weights of frozen models that come to a rank for one pass over the rollouts."""
    parameters, kept = run.frozen * share(model, run).size, run.ref_dtype or run.stored
    if not parameters:
        return []
    if run.placement == "cpu":
        return [Move("frozen models, from the host", "host", parameters * kept.itemsize)]
    if run.placement == "sharded" and run.copies > 1:
        item = (run.dtype if run.shard == "fsdp2" else kept).itemsize
        return [Move("frozen models, layer by layer", "all-gather", parameters * item, run.copies, run.tp, True)]
    return []


def _weights(model: Model, run: Run) -> list[Move]:
    """Of weights, gradients and optimiser, among the ranks that train the same parameters."""
    own, item = share(model, run), run.dtype.itemsize
    among = (run.copies, run.tp)
    adapters = own.trained if run.lora else 0
    apart = own.embeddings if run.splits_head else 0  # rows of the head that stay where they are
    gathered, ends = own.size + adapters - apart, own.ends - apart
    reduced = own.trained - (0 if run.lora else apart)
    if run.shard == "ddp":
        return [Move("gradients", "all-reduce", own.trained * run.learning.itemsize, *among, True)]
    if run.shards_weights:
        again = gathered - ends if run.shard == "fsdp2" else gathered
        moves = [
            Move("weights, forward", "all-gather", gathered * item, *among, True),
            Move("weights, backward", "all-gather", again * item, *among, True),
            Move("gradients", "reduce-scatter", reduced * item, *among, True),
        ]
    elif run.zero:
        moves = [
            Move("gradients", "reduce-scatter", own.trained * item, *among, True),
            Move("weights, after the step", "all-gather", own.trained * item, *among),
        ]
    else:
        moves = []
    if run.offload_optimizer:
        mine = own.trained * item // run.copies
        moves.append(Move("gradients, to the host", "host", mine, overlaps=True))
        moves.append(Move("weights, from the host", "host", mine))
    return moves


def _activations(model: Model, run: Run) -> list[Move]:
    """Of tensor and of context parallelism."""
    item, passes = run.dtype.itemsize, 2 + run.checkpointing
    sums = 7 + run.checkpointing  # recomputing stops before the second of forward's
    states = run.positions * model.hidden * item
    keys = 2 * run.batch * run.length * model.kv_width * item // run.tp
    return [
        Move("embeddings, tp", "all-reduce", states, run.tp),
        Move("attention and MLP, tp", "all-reduce", sums * model.layers * states, run.tp),
        Move("keys and values, cp", "all-gather", passes * model.layers * keys, run.cp, run.tp),
        Move("their gradients, cp", "reduce-scatter", model.layers * keys, run.cp, run.tp),
    ]


def _head(model: Model, run: Run) -> list[Move]:
    """Of a head that is split over the tp ranks, or under FSDP2 over all."""
    if run.splits_head:
        ranks, tokens = run.copies, run.tokens * run.copies
        row = model.hidden * run.dtype.itemsize + PER_TOKEN
        moves = [Move("tokens of the head", "all-gather", tokens * row, ranks)]
    elif run.tp > 1:
        ranks, tokens, moves = run.tp, run.tokens, []
    else:
        return []
    return [
        *moves,
        Move("statistics of the head", "all-gather", ranks * STATISTICS * tokens, ranks),
        Move("hidden gradient of the head", "all-reduce", 4 * model.hidden * tokens, ranks, 1, True),
    ]
