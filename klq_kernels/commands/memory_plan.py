"""``klq plan``: will this model train in this much memory, with how large a batch, and what does the loss cost.

The memory of a training step is what stands all the time (weights of every model held, gradients, optimiser state), the
activations that backward needs, and the loss. Only the last differs between the naive and the fused loss, and it is
predicted by ``loss_memory``, from the chunks that the library chooses. Activations are estimated for a decoder with
fused attention, in the style of Korthikanti et al. (arXiv 2205.05198): good to perhaps a quarter, where the
rest is counted exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..call.checks import require
from ..call.head import MOST_SAMPLES
from . import loss_memory
from .loss_memory import Memory, Problem

GIB = 2**30
OPTIMIZER_BYTES = {  # state per trained parameter, besides an fp32 master copy where the weights are 16-bit
    "adamw": 8,
    "adamw-8bit": 2,
    "sgd-momentum": 4,
    "sgd": 0,
}
LORA_MODULES = 7  # linear layers of a decoder block that get adapters: q, k, v, o, gate, up, down


class Model(NamedTuple):
    """A decoder-only language model. ``parameters`` None: counted from the sizes."""

    hidden: int
    vocab: int
    layers: int
    intermediate: int
    tied: bool = False
    kv_share: float = 1.0  # key/value heads over query heads
    parameters: int | None = None

    @property
    def size(self) -> int:
        """Number of parameters."""
        if self.parameters is not None:
            return self.parameters
        attention = (2 + 2 * self.kv_share) * self.hidden**2
        block = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        heads = (1 if self.tied else 2) * self.vocab * self.hidden
        return int(self.layers * block) + heads + self.hidden


class Run(NamedTuple):
    """How it is trained. ``length`` counts prompt and response, ``response`` the trained tokens of each sequence."""

    batch: int
    length: int
    response: int
    dtype: torch.dtype = torch.bfloat16
    lora: int = 0  # rank of the adapters; 0: every parameter is trained
    optimizer: str = "adamw"
    models: int | None = None  # held in memory: the policy, a reference, ...; by default 2, and with adapters 1
    checkpointing: bool = True
    device: torch.device = torch.device("cuda")
    workspace_bytes: int | None = None
    weights: torch.dtype | None = None  # what the weights are stored in; fp32 under autocast; None: as dtype
    fp32_logits: bool = False
    samples: int = 0  # of a sampled gradient through the head; 0: dense

    @property
    def stored(self) -> torch.dtype:
        return self.weights or self.dtype

    @property
    def held(self) -> int:
        """With adapters, the model without them is the reference."""
        return self.models if self.models is not None else 1 if self.lora else 2


class Plan(NamedTuple):
    """Bytes of a step, term by term, with the loss fused and naive."""

    standing: dict[str, int]
    naive: Memory
    fused: Memory
    problem: Problem

    def total(self, loss: Memory) -> int:
        return sum(self.standing.values()) + loss.peak


def from_config(path_or_id: str) -> Model:
    """Sizes from a Hugging Face config: a directory, a file or an id. Needs transformers.

    Raises:
        ValueError: where there is no such config, or it is not that of a language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path_or_id)
    except (OSError, ValueError) as error:
        raise ValueError(f"config: cannot load {path_or_id!r}: {error}") from error
    text = config.get_text_config()
    wanted = ("hidden_size", "vocab_size", "num_hidden_layers")
    absent = [name for name in wanted if not hasattr(text, name)]
    require(not absent, "config", f"{path_or_id} has no {', '.join(absent)}")
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    query_heads = getattr(text, "num_attention_heads", 1)
    return Model(
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        layers=text.num_hidden_layers,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        kv_share=(getattr(text, "num_key_value_heads", None) or query_heads) / query_heads,
        parameters=count,
    )


def device_for(name: str | None, measure: bool) -> torch.device:
    """The device that is named; by default a GPU or, where its speed is to be measured, what this machine has."""
    present = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    if name is None:
        name = present[0] if measure else "cuda"
    require(name in ("cuda", "cpu"), "device", f"must be cuda or cpu, got {name!r}")
    missing = "PyTorch sees no GPU here to measure; give --device cpu, or --tflops in place of --measure"
    require(not measure or name in present, "device", missing)
    return torch.device(name)


def trained_parameters(model: Model, run: Run) -> int:
    """All of them, or those of the adapters (each linear layer of a block gets rank x (in + out))."""
    if not run.lora:
        return model.size
    ends = 4 * 2 * model.hidden + 3 * (model.hidden + model.intermediate)
    return model.layers * run.lora * ends


def activation_bytes(model: Model, run: Run) -> int:
    """Activations that backward needs: every block's input, plus one whole block (checkpointing) or all of them.

    A block keeps about 10 copies of the hidden states (norms, projections, attention, residuals) and 4 of the
    intermediate ones; fused attention keeps no [T, T] matrix.
    """
    tokens = run.batch * run.length
    item = run.dtype.itemsize
    block = tokens * item * (10 * model.hidden + 4 * model.intermediate)
    inputs = model.layers * tokens * item * model.hidden
    return inputs + block if run.checkpointing else model.layers * block


def autocast_bytes(model: Model, run: Run) -> int:
    """The copies of the body's fp32 weights in which its products run, which backward needs too: all of them, or with
    checkpointing those of one block.
    """
    if run.stored == run.dtype:
        return 0
    body = model.size - (1 if model.tied else 2) * model.vocab * model.hidden
    return body * run.dtype.itemsize // (max(model.layers, 1) if run.checkpointing else 1)


def problem(model: Model, run: Run) -> Problem:
    """The head of this run. Under LoRA the head itself is frozen."""
    return Problem(
        tokens=run.batch * run.response,
        hidden=model.hidden,
        vocab=model.vocab,
        dtype=run.dtype,
        device=run.device,
        positions=run.batch * run.length,
        weight_gradient=not run.lora,
        workspace_bytes=run.workspace_bytes,
        weight_dtype=run.stored,
        fp32_logits=run.fp32_logits,
        samples=run.samples,
    )


def _without_trained_head(loss: Memory) -> Memory:
    """The loss's terms without the weight gradient, which is counted among the gradients of the step."""
    return Memory(*({k: v for k, v in terms.items() if k != "weight gradient"} for terms in loss))


def plan(model: Model, run: Run) -> Plan:
    """The memory of a training step. Raises ValueError naming what is out of range."""
    for name, count in (("batch", run.batch), ("length", run.length), ("response", run.response), ("models", run.held)):
        require(count >= 1, name, f"must be at least 1, got {count}")
    require(
        run.stored in (run.dtype, torch.float32),
        "weights",
        "must be as dtype, or fp32, which autocast casts for each use",
    )
    require(run.response <= run.length, "response", f"must not exceed length {run.length}, got {run.response}")
    require(
        0 <= run.samples <= MOST_SAMPLES, "samples", f"must be in [1, {MOST_SAMPLES}], or 0: dense; got {run.samples}"
    )
    require(run.lora >= 0, "lora", f"must be a rank, or 0 to train every parameter; got {run.lora}")
    require(
        run.optimizer in OPTIMIZER_BYTES,
        "optimizer",
        f"must be one of {', '.join(OPTIMIZER_BYTES)}; got {run.optimizer!r}",
    )
    trained = trained_parameters(model, run)
    stored = run.stored.itemsize
    learning = 4 if run.lora else stored  # peft keeps adapters in fp32
    master = 4 * trained if learning != 4 else 0
    tokens = run.batch * run.length
    standing = {
        f"weights of {run.held} model(s)": run.held * model.size * stored,
        "adapters": trained * learning if run.lora else 0,
        "gradients": trained * learning,
        "autocast's copies of weights": autocast_bytes(model, run),
        f"optimiser state ({run.optimizer})": trained * OPTIMIZER_BYTES[run.optimizer] + master,
        "activations (estimate)": activation_bytes(model, run),
        "last hidden states": tokens * model.hidden * run.dtype.itemsize,
        "values, log-probs, targets": 8 * 4 * tokens,
    }
    head = problem(model, run)
    naive, fused = loss_memory.naive_memory(head), loss_memory.fused_memory(head)
    return Plan(
        {k: v for k, v in standing.items() if v}, _without_trained_head(naive), _without_trained_head(fused), head
    )


def most(fits: Callable[[int], bool]) -> int:
    """The largest count that fits, 0 where not even 1 does; ``fits`` must be monotone."""
    if not fits(1):
        return 0
    high = 1
    while fits(high * 2):
        high *= 2
    low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest(model: Model, run: Run, budget: int, *, fused: bool, axis: str) -> int:
    """The largest ``batch``, or ``length`` (response growing in proportion), whose step fits ``budget`` bytes."""
    require(axis in ("batch", "length"), "axis", f"must be batch or length, got {axis!r}")

    def fits(count: int) -> bool:
        if axis == "batch":
            tried = run._replace(batch=count)
        else:
            tried = run._replace(length=count, response=max(math.ceil(count * run.response / run.length), 1))
        found = plan(model, tried)
        return found.total(found.fused if fused else found.naive) <= budget

    return most(fits)


def products(head: Problem) -> int:
    """Matrix products over the vocabulary: one, and one for each gradient that is needed and not sampled."""
    return 1 if head.sampled else 1 + head.hidden_gradient + head.weight_gradient


def loss_seconds(head: Problem, flop_per_second: float) -> float:
    """Time of the loss's matrix products."""
    return products(head) * head.gemm_flop / flop_per_second


def step_seconds(model: Model, run: Run, flop_per_second: float) -> float:
    """Time of the body's matrix products: one pass forward, two backward (one under LoRA), one more to recompute."""
    body = model.size - (1 if model.tied else 2) * model.vocab * model.hidden
    passes = 2 + (not run.lora) + run.checkpointing
    return passes * 2 * body * run.batch * run.length / flop_per_second


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


def strategy(found: Plan) -> str:
    """The way in which the library will compute this head, and the reason."""
    skipped = (
        "" if found.problem.weight_gradient else " (the head is frozen: its gradient and accumulator are left out)"
    )
    made = f"one pass, {products(found.problem)} matrix products"
    if found.problem.sampled:
        made = (
            f"one pass, 1 matrix product, gradients from at most {found.problem.samples + 1} entries a token on average"
        )
    return f"{made}{skipped}; {loss_memory.why_chunks(found.problem)}"


def report(model: Model, run: Run, budget: int | None, flop_per_second: float | None) -> dict[str, Any]:
    """Everything ``klq plan`` prints, as plain JSON values."""
    found = plan(model, run)
    out: dict[str, Any] = {
        "model": {**model._asdict(), "parameters": model.size},
        "run": {
            **run._asdict(),
            "dtype": str(run.dtype).removeprefix("torch."),
            "weights": str(run.stored).removeprefix("torch."),
            "models": run.held,
            "device": str(run.device),
        },
        "standing_bytes": found.standing,
        "loss_bytes": {
            name: {"terms": memory.terms, "peak": memory.peak}
            for name, memory in (("naive", found.naive), ("fused", found.fused))
        },
        "total_bytes": {"naive": found.total(found.naive), "fused": found.total(found.fused)},
        "chunk_rows": found.problem.rows,
        "chunks": found.problem.chunks,
        "strategy": strategy(found),
    }
    if budget is not None:
        out["budget_bytes"] = budget
        out["largest"] = {
            axis: {name: largest(model, run, budget, fused=name == "fused", axis=axis) for name in ("naive", "fused")}
            for axis in ("batch", "length")
        }
    if flop_per_second is not None:
        out["flop_per_second"] = flop_per_second
        out["loss_seconds"] = loss_seconds(found.problem, flop_per_second)
        out["body_seconds"] = step_seconds(model, run, flop_per_second)
    return out


def show(content: dict[str, Any]) -> None:
    """Prints ``report`` as tables (needs rich)."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    model, run = content["model"], content["run"]
    console.print(
        f"{model['parameters'] / 1e9:.2f}B parameters, H={model['hidden']} V={model['vocab']}; batch {run['batch']} x "
        f"{run['length']} tokens, {run['response']} trained; {run['dtype']}, weights in {run['weights']}, on "
        f"{run['device']}"
    )
    table = Table("memory of a step", "naive", "fused")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, size in content["standing_bytes"].items():
        table.add_row(name, _gib(size), _gib(size))
    loss = content["loss_bytes"]
    for name in dict.fromkeys([*loss["naive"]["terms"], *loss["fused"]["terms"]]):
        table.add_row(f"loss: {name}", *(_gib(loss[kind]["terms"].get(name, 0)) for kind in ("naive", "fused")))
    table.add_section()
    table.add_row("loss, peak", *(_gib(loss[kind]["peak"]) for kind in ("naive", "fused")))
    table.add_row("step, peak", *(_gib(content["total_bytes"][kind]) for kind in ("naive", "fused")), style="bold")
    for axis, found in content.get("largest", {}).items():
        title = f"largest {axis} within {_gib(content['budget_bytes'])}"
        table.add_row(title, *(f"{found[kind]:,}" for kind in ("naive", "fused")))
    console.print(table)
    console.print(f"Strategy: {content['strategy']}.")
    if "flop_per_second" in content:
        console.print(
            f"At {content['flop_per_second'] / 1e12:,.3g} TFLOP/s: matrix products of the loss "
            f"{content['loss_seconds']:.3g} s, of the body {content['body_seconds']:.3g} s per step."
        )


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB" if size else "-"
