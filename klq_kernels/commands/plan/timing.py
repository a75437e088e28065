"""Seconds of a step, from the rates of the machine.

Products count their operations: 2 per parameter and token in forward, twice that in backward (once under LoRA), once
more to recompute; attention 2 T^2 x width x layers per sequence in forward (causal), and so on alike. What runs
between the products writes and reads each activation once per pass; the optimiser reads and writes its state, the
weights and the gradients. A group of ranks inside a node uses ``node``; one that leaves it, the ``link``s of all its
ranks in a node, but no more than ``node``.

How much of the traffic hides behind products depends on the engine's schedule, so a step is given as a range: all that
can overlap does, and nothing does.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from ..loss_memory import Problem
from .memory import problem, share
from .run import OPTIMIZER_BYTES, Run
from .shapes import Model
from .traffic import Move, traffic


class Rates(NamedTuple):
    """Per GPU, and per second; None leaves a time out. ``gpus_per_node`` are joined by ``node``."""

    flop: float | None = None
    memory: float | None = None
    node: float | None = None
    link: float | None = None
    host: float | None = None
    gpus_per_node: int = 8


# An H100 SXM in an 8-GPU node. Products and copies: measured on one (three GEMMs of 8,192 x 4,096 x 128,256, and copy,
# in docs/benchmarks.md). NVLink 4: 900 GB/s both ways together, PCIe 5: 128 GB/s both ways (NVIDIA's data sheet of the
# H100). Between nodes: one 400 Gb/s adapter per GPU (NVIDIA's data sheet of the DGX H100).
H100 = Rates(flop=760e12, memory=3.0e12, node=450e9, link=50e9, host=64e9)


class Seconds(NamedTuple):
    """Of one step on a rank; ``traffic`` by the name of each move."""

    body: float
    attention: float
    loss: float
    activations: float
    optimizer: float
    traffic: dict[str, float]
    exposed: float  # of the traffic, what no engine hides

    @property
    def computing(self) -> float:
        return self.body + self.attention + self.loss + self.activations + self.optimizer

    @property
    def least(self) -> float:
        """With all that can overlap hidden behind the body."""
        hidden = sum(self.traffic.values()) - self.exposed
        return self.computing + self.exposed + max(hidden - self.body - self.attention - self.activations, 0.0)

    @property
    def most(self) -> float:
        return self.computing + sum(self.traffic.values())


def products(head: Problem) -> int:
    """Matrix products over the vocabulary: one, and one for each gradient that is needed and not sampled."""
    return 1 if head.sampled else 1 + head.hidden_gradient + head.weight_gradient


def loss_seconds(head: Problem, flop_per_second: float) -> float:
    """Time of the loss's matrix products."""
    return products(head) * head.gemm_flop / flop_per_second


def passes(run: Run) -> int:
    """Forward, two backward (one under LoRA), one more to recompute."""
    return 2 + (not run.lora) + run.checkpointing


def step_seconds(model: Model, run: Run, flop_per_second: float) -> float:
    """Time of the body's products with its weights; those that a token passes through."""
    return passes(run) * 2 * model.active_body / run.tp * run.positions / flop_per_second


def attention_seconds(model: Model, run: Run, flop_per_second: float) -> float:
    """Time of the products of queries with keys, and of their weights with values."""
    flop = 2 * run.batch * run.length**2 * model.width * model.layers / (run.tp * run.cp)
    return (3 + run.checkpointing) * flop / flop_per_second


def _activation_traffic(model: Model, run: Run) -> int:
    """Bytes that the operations between a step's products write and read."""
    inside = 2 * model.hidden + 2 * model.width + 4 * model.intermediate * model.active_experts
    block = run.positions * run.dtype.itemsize * (6 * model.hidden + inside // run.tp)
    return (3 + run.checkpointing) * 2 * model.layers * block


def _optimizer_traffic(model: Model, run: Run) -> int:
    """Bytes of weights, states and masters, read and written, and of gradients, read. None where the host does it."""
    if run.offload_optimizer:
        return 0
    mine = math.ceil(share(model, run).trained / run.optimizer_ranks)
    learning = run.learning.itemsize
    state = OPTIMIZER_BYTES[run.optimizer] + (4 if learning != 4 else 0)
    return mine * (2 * state + 3 * learning)


def bandwidth(move: Move, rates: Rates) -> float | None:
    """Bytes per second and rank of the way that a move takes."""
    if move.kind == "host":
        return rates.host
    if move.ranks * move.stride <= rates.gpus_per_node or rates.link is None:
        return rates.node
    together = min(max(rates.gpus_per_node // move.stride, 1), move.ranks) * rates.link
    return together if rates.node is None else min(together, rates.node)


def seconds(move: Move, rates: Rates) -> float:
    rate = bandwidth(move, rates)
    return move.sent / rate if rate else 0.0


def step(model: Model, run: Run, rates: Rates) -> Seconds:
    """The time of a step, by its parts; 0 for those whose rate is not given."""
    flop = rates.flop or math.inf
    memory = rates.memory or math.inf
    moves = traffic(model, run)
    times = [(move, seconds(move, rates)) for move in moves]
    return Seconds(
        body=step_seconds(model, run, flop),
        attention=attention_seconds(model, run, flop),
        loss=loss_seconds(problem(model, run), flop),
        activations=_activation_traffic(model, run) / memory,
        optimizer=_optimizer_traffic(model, run) / memory,
        traffic={move.name: took for move, took in times},
        exposed=sum(took for move, took in times if not move.overlaps),
    )


def measured_gemm_rate(head: Problem) -> float:
    """FLOP per second of a product of the head's width on this machine's device, best of a few."""
    rows, vocab = min(head.rows, 1024), min(head.vocab, 32_768)
    left = torch.randn(rows, head.hidden, device=head.device).to(head.dtype)
    right = torch.randn(vocab, head.hidden, device=head.device).to(head.dtype)
    out = torch.empty(rows, vocab, dtype=head.dtype, device=head.device)
    best = math.inf
    for _ in range(5):
        if head.device.type == "cuda":
            torch.cuda.synchronize(head.device)
        start = time.perf_counter()
        torch.mm(left, right.T, out=out)
        if head.device.type == "cuda":
            torch.cuda.synchronize(head.device)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * vocab * head.hidden / best


def device_for(name: str | None, measure: bool) -> torch.device:
    """The device that is named; by default a GPU or, where its speed is to be measured, what this machine has."""
    present = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    if name is None:
        name = present[0] if measure else "cuda"
    if name not in ("cuda", "cpu"):
        raise ValueError(f"device: must be cuda or cpu, got {name!r}")
    if measure and name not in present:
        raise ValueError("device: PyTorch sees no GPU here to measure; give --device cpu, or --tflops, not --measure")
    return torch.device(name)
