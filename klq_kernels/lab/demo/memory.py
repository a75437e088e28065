"""Naive against fused on one realistic head: do they agree, how long do they take, how much memory do they need?

Three contenders compute the same loss and the same gradients of hidden states, lm_head and values:

    naive, all tokens        the model's full logits, log_softmax, gather: what a trainer writes first
    naive, response tokens   the same on the trained tokens only: what it writes after the first out-of-memory error
    fused_klq_loss           the library

Agreement is measured against the naive computation in float64. Times are medians of interleaved rounds. Memory is the
growth of the process's peak resident size over its inputs, measured once per contender in a fresh process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from klq_kernels import KLQTargets, fused_klq_loss, pack, reference

MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """A batch of prompts with ragged responses, and a head with Pythia's vocabulary; fp32."""

    batch: int = 8
    prompt: int = 64
    response: int = 128  # the longest
    hidden: int = 512
    vocab: int = 50304
    workspace_mib: int = 64  # that fused_klq_loss may use

    @property
    def tokens(self) -> int:
        return self.batch * (self.prompt + self.response)

    @property
    def gradient_bytes(self) -> int:
        """The gradients that every contender returns: those of the hidden states, the lm_head and the values."""
        return 4 * (self.tokens * self.hidden + self.vocab * self.hidden + self.tokens)

    def with_vocab(self, vocab: int) -> Shape:
        return replace(self, vocab=vocab)


@dataclass
class Inputs:
    """The inputs that a trainer has when it computes the loss."""

    hidden: Tensor  # [B, P + T, H]
    weight: Tensor  # [V, H]
    actions: Tensor  # [B, P + T]
    values: Tensor  # [B, P + T]
    targets: KLQTargets  # [B, P + T] each
    mask: Tensor  # bool [B, P + T]: False on prompts and padding
    workspace_bytes: int

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.values

    def double(self) -> Inputs:
        hidden, weight, values = (t.detach().double().requires_grad_() for t in self.leaves())
        targets = KLQTargets(*(t.double() for t in self.targets))
        return replace(self, hidden=hidden, weight=weight, values=values, targets=targets)


def make_inputs(shape: Shape, seed: int) -> Inputs:
    """Logits like a trained model's: Zipf's law over the vocabulary, and a sharp peak near the token that was taken."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    rows, columns = shape.batch, shape.prompt + shape.response
    zipf = torch.arange(1, shape.vocab + 1).float().reciprocal()
    actions = torch.multinomial(zipf, rows * columns, replacement=True, generator=generator).reshape(rows, columns)
    weight = normal(shape.vocab, shape.hidden).div_(shape.hidden**0.5)
    weight[:, 0] = zipf.log()  # against a constant hidden unit: the unigram prior
    hidden = (
        normal(rows, columns, shape.hidden) + 6 * torch.rand(rows, columns, 1, generator=generator) * weight[actions]
    )
    hidden[..., 0] = 1.0
    lengths = torch.randint(shape.response // 3, shape.response + 1, (rows, 1), generator=generator)
    position = torch.arange(columns) - shape.prompt
    targets = KLQTargets(-normal(rows, columns).abs(), normal(rows, columns) / 3, normal(rows, columns) / 3)
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        actions,
        (normal(rows, columns) / 3).requires_grad_(),
        targets,
        (position >= 0) & (position < lengths),
        shape.workspace_mib * MIB,
    )


def naive_all(x: Inputs) -> Tensor:
    logprobs = F.linear(x.hidden, x.weight).log_softmax(-1).gather(-1, x.actions.unsqueeze(-1)).squeeze(-1)
    return reference.klq_loss(logprobs, x.values, x.targets, mask=x.mask).loss


def naive_responses(x: Inputs) -> Tensor:
    logprobs = F.linear(x.hidden[x.mask], x.weight).log_softmax(-1)
    taken = logprobs.gather(-1, x.actions[x.mask].unsqueeze(-1)).squeeze(-1)
    return reference.klq_loss(taken, x.values[x.mask], KLQTargets(*(t[x.mask] for t in x.targets))).loss


def fused(x: Inputs) -> Tensor:
    return fused_klq_loss(
        x.hidden, x.weight, x.actions, x.values,
        targets=x.targets, packing=pack(mask=x.mask), workspace_bytes=x.workspace_bytes,
    ).loss  # fmt: skip


CONTENDERS: dict[str, Callable[[Inputs], Tensor]] = {
    "naive, all tokens": naive_all,
    "naive, response tokens": naive_responses,
    "fused_klq_loss": fused,
}
FUSED = "fused_klq_loss"


def loss_and_gradients(name: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """(loss, d_hidden, d_weight, d_values)."""
    loss = CONTENDERS[name](inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs.leaves())


def agreement(inputs: Inputs) -> dict[str, dict[str, float]]:
    """Each contender's relative error, |x - gold| / |gold| in the 2-norm, of the loss and of each gradient."""
    gold = loss_and_gradients("naive, response tokens", inputs.double())
    errors = {}
    for name in CONTENDERS:
        results = loss_and_gradients(name, inputs)
        relative = [((x - g).norm() / g.norm()).item() for x, g in zip(results, gold, strict=True)]
        errors[name] = dict(zip(("loss", "d_hidden", "d_weight", "d_values"), relative, strict=True))
    return errors


def times(inputs: Inputs, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward, in rounds that visit every contender once. They must have run before."""
    taken: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, seconds in taken.items():
            begin = perf_counter()
            loss_and_gradients(name, inputs)
            seconds.append(perf_counter() - begin)
    return taken


def resident(field: str) -> int:
    """Bytes of this process: VmRSS, what is resident now, or VmHWM, the most that was. Linux only."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def peak_growth(name: str, shape: Shape, seed: int) -> int:
    """Bytes by which one call's peak exceeds what was resident before it. Call it in a fresh process."""
    loss_and_gradients(name, make_inputs(replace(shape, batch=1, prompt=2, response=6, vocab=64), seed))  # loads code
    inputs = make_inputs(shape, seed)
    if not os.path.exists("/proc/self/clear_refs"):
        # getrusage has no reset: right as long as the call peaks above the making of its inputs, as it does here.
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loss_and_gradients(name, inputs)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from VmRSS
    before = resident("VmRSS")
    loss_and_gradients(name, inputs)
    return resident("VmHWM") - before


def peak_growth_in_fresh_process(name: str, shape: Shape, seed: int) -> int:
    package_parent = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, json.dumps({"name": name, "shape": asdict(shape), "seed": seed})],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {name!r} failed:\n{done.stderr}")
    return int(done.stdout)


def measure(
    shape: Shape,
    *,
    vocabularies: tuple[int, ...],
    rounds: int,
    seed: int,
    progress: Callable[[str], None] = lambda doing: None,
) -> dict[str, Any]:
    """Everything, as plain numbers ready for JSON; ``progress`` is told what is being measured."""
    inputs = make_inputs(shape, seed)
    progress("agreement with float64")
    errors = agreement(inputs)  # runs every contender, and so warms them up
    progress("time")
    seconds = times(inputs, rounds)
    peaks: dict[str, dict[int, int]] = {name: {} for name in CONTENDERS}
    for vocab in sorted({*vocabularies, shape.vocab}):
        for name in CONTENDERS:
            progress(f"memory, vocabulary {vocab:,}, {name}")
            peaks[name][vocab] = peak_growth_in_fresh_process(name, shape.with_vocab(vocab), seed)
    return {
        "shape": {**asdict(shape), "tokens": shape.tokens, "response_tokens": int(inputs.mask.sum())},
        "threads": torch.get_num_threads(),
        "gradient_bytes": {v: shape.with_vocab(v).gradient_bytes for v in sorted({*vocabularies, shape.vocab})},
        "contenders": {
            name: {
                "relative_error": errors[name],
                "seconds": median(seconds[name]),
                "seconds_of_rounds": seconds[name],
                "peak_bytes": peaks[name][shape.vocab],
                "peak_bytes_by_vocab": peaks[name],
            }
            for name in CONTENDERS
        },
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(peak_growth(request["name"], Shape(**request["shape"]), request["seed"]))
