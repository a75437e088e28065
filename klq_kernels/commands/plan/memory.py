"""Bytes of a training step on one rank, term by term.

What stands all the time is counted exactly: weights, masters, gradients and optimiser states, whole or one rank's
share; models that are not trained; what an engine gathers or buckets beside them. The loss is predicted by
``loss_memory`` from the chunks that the library chooses, and is all that differs between the naive and the fused one.
Activations are estimated for a decoder with fused attention, in the style of Korthikanti et al. (arXiv 2205.05198):
good to perhaps a quarter.

All terms are added up, though a layer's backward and the loss do not run at once: the sum is on the safe side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import loss_memory
from ..loss_memory import Memory, Problem
from .run import OPTIMIZER_BYTES, Run, check, trained_parameters
from .shapes import Model

LAYERS_AT_ONCE = 2  # gathered: the one in use, and the one fetched ahead
BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time (its default reduce_bucket_size)


class Share(NamedTuple):
    """Parameters of one rank's part of the matrices (tensor parallel); norms lie whole on every rank."""

    size: int
    block: int
    embeddings: int  # and as many of the lm_head
    ends: int
    trained: int
    trained_block: int


def share(model: Model, run: Run) -> Share:
    tp, layers = run.tp, max(model.layers, 1)

    def part(parameters: int, whole: int) -> int:
        return whole + math.ceil((parameters - whole) / tp)

    size = part(model.size, model.norms)
    block = part(model.block, 2 * model.hidden)
    trained, trained_block = size, block
    if run.lora:  # of the two factors of an adapter, the one on the side that is not split lies whole
        factors = 7 if model.experts == 1 else 4
        trained = part(trained_parameters(model, run), model.layers * factors * run.lora * model.hidden)
        trained_block = math.ceil(trained / layers)
    return Share(size, block, math.ceil(model.embeddings / tp), part(model.ends, model.hidden), trained, trained_block)


class Plan(NamedTuple):
    """Bytes on a rank. ``standing`` and a loss make the step; ``scoring`` is another moment, which may need more."""

    standing: dict[str, int]
    naive: Memory
    fused: Memory
    problem: Problem
    scoring: dict[str, int]  # what stands while frozen models that wait on the host are on the device
    host: dict[str, int]

    def total(self, loss: Memory) -> int:
        return max(sum(self.standing.values()) + loss.peak, sum(self.scoring.values()))


def activation_bytes(model: Model, run: Run) -> int:
    """Activations that backward needs: every block's input, plus one whole block (checkpointing) or all of them.

    A block keeps about 10 copies of the hidden states (6 around norms and residuals, 4 inside attention) and 4 of the
    intermediate ones of every expert that a token passes through; fused attention keeps no [T, T] matrix. Tensor
    parallelism splits those inside attention and MLP.
    """
    item = run.dtype.itemsize
    inside = 2 * model.hidden + 2 * model.width + 4 * model.intermediate * model.active_experts
    block = run.positions * item * (6 * model.hidden + math.ceil(inside / run.tp))
    inputs = model.layers * run.positions * item * model.hidden
    return inputs + block if run.checkpointing else model.layers * block


def autocast_bytes(model: Model, run: Run) -> int:
    """The copies of the body's fp32 weights in which its products run, which backward needs too: all of them, or with
    checkpointing those of one block. FSDP2 gathers such copies instead.
    """
    if run.stored == run.dtype or run.shard == "fsdp2":
        return 0
    body = math.ceil(model.body / run.tp)
    return body * run.dtype.itemsize // (max(model.layers, 1) if run.checkpointing else 1)


def problem(model: Model, run: Run) -> Problem:
    """The head of this run on one rank, whose rows or all of it. Under LoRA the head itself is frozen."""
    own = Problem(
        tokens=run.tokens,
        hidden=model.hidden,
        vocab=math.ceil(model.vocab / run.tp),
        dtype=run.dtype,
        device=run.device,
        positions=run.positions,
        weight_gradient=not run.lora,
        workspace_bytes=run.workspace_bytes,
        weight_dtype=run.dtype if run.shard == "fsdp2" else run.stored,
        fp32_logits=run.fp32_logits,
        samples=run.samples,
    )
    if not run.splits_head:
        return own
    rows = math.ceil(model.vocab / run.copies)
    return own._replace(tokens=run.tokens * run.copies, positions=None, vocab=rows, weight_dtype=run.stored)


def _naive_problem(model: Model, run: Run) -> Problem:
    """Full logits of a rank's own tokens over the whole vocabulary, from a gathered head."""
    whole = run._replace(tp=1, head="gathered")
    return problem(model, whole)


def _losses(model: Model, run: Run) -> tuple[Memory, Memory]:
    """(naive, fused). A weight gradient that stands among the step's gradients is counted there; one that is made whole
    before a rank keeps its share of it is the loss's.
    """
    head = problem(model, run)
    naive, fused = loss_memory.naive_memory(_naive_problem(model, run)), loss_memory.fused_memory(head)
    if run.splits_head or run.tp > 1:
        wide = head.dtype != torch.float32
        fused = _with(fused, {"hidden gradient, summed in fp32": 4 * head.tokens * model.hidden * wide})
        naive = _with(naive, {"gathered head": model.embeddings * run.dtype.itemsize})
    if run.splits_head:
        fused = _with(fused, {"gathered tokens": head.tokens * model.hidden * run.dtype.itemsize})
    if run.gradient_ranks == 1:
        return _without_head(naive), _without_head(fused)
    return naive, _without_head(fused) if run.splits_head else fused


def _with(loss: Memory, terms: dict[str, int]) -> Memory:
    return Memory(*({**moment, **{k: v for k, v in terms.items() if v}} for moment in loss))


def _without_head(loss: Memory) -> Memory:
    return Memory(*({k: v for k, v in terms.items() if k != "weight gradient"} for terms in loss))


def engine_bytes(model: Model, run: Run) -> dict[str, int]:
    """What an engine holds beside its share: whole layers while they run, their gradients, buckets of reductions."""
    if run.copies == 1:
        return {}
    own, item = share(model, run), run.dtype.itemsize
    found = {}
    if run.shards_weights:
        ends = own.ends - (own.embeddings if run.splits_head else 0)
        found["gathered layers (2)"] = LAYERS_AT_ONCE * own.block * item
        found["gathered embeddings and head"] = ends * item  # whole from forward to backward
    if run.shards_gradients:
        embeddings = 0 if run.lora or not run.shards_weights else own.embeddings
        found["whole gradients of a layer"] = (2 * own.trained_block + embeddings) * item  # and as they are sent
    if run.shard == "ddp":
        found["DDP's buckets"] = own.trained * run.learning.itemsize
    if run.zero:
        found["DeepSpeed's bucket"] = min(BUCKET, own.trained) * item
    return found


def plan(model: Model, run: Run) -> Plan:
    """The memory of a training step. Raises ValueError naming what is out of range or impossible."""
    check(model, run)
    own, learning = share(model, run), run.learning.itemsize
    trained = math.ceil(own.trained / run.optimizer_ranks)
    weights = math.ceil(own.size / run.weight_ranks) * run.stored.itemsize
    adapters = math.ceil(own.trained / run.weight_ranks) * learning if run.lora else 0
    states = {
        "fp32 masters": 4 * trained if learning != 4 else 0,
        f"optimiser state ({run.optimizer})": trained * OPTIMIZER_BYTES[run.optimizer],
    }
    whole_frozen = run.frozen * own.size * (run.ref_dtype or run.stored).itemsize
    frozen = {
        "device": whole_frozen,
        "cpu": 0,
        "sharded": math.ceil(whole_frozen / run.copies),
    }[run.placement]
    name = "reference" if run.frozen == 1 else f"{run.frozen} frozen models"
    kept = {
        "weights": weights,
        "adapters": adapters,
        **({} if run.offload_optimizer else states),
        name: frozen,
    }
    engine = engine_bytes(model, run)
    standing = {
        **kept,
        "gradients": math.ceil(own.trained / run.gradient_ranks) * learning,
        **engine,
        "autocast's copies of weights": autocast_bytes(model, run),
        "activations (estimate)": activation_bytes(model, run),
        "last hidden states": run.positions * model.hidden * run.dtype.itemsize,
        "values, log-probs, targets": 8 * 4 * run.positions,
    }
    on_host = run.placement == "cpu" and run.frozen > 0
    scoring = {**kept, f"{name}, from the host": whole_frozen} if on_host else {}
    host = {f"{name}": whole_frozen if on_host else 0}
    if run.offload_optimizer:
        host |= {**states, "fp32 gradients": 4 * trained}
    naive, fused = _losses(model, run)
    return Plan(_present(standing), naive, fused, problem(model, run), _present(scoring), _present(host))


def _present(terms: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in terms.items() if size}
