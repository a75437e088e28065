"""The tasks that are measured: inputs, contenders, the right answer, and the floor that no contender can go below.

``oracle`` is the right answer in float64, ``yardstick`` the plain computation in the inputs' dtype: how far that is off
says what error is normal there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import oracle
from .contenders import Call, Contender, Outputs, divergence, ours, peers, plain, scans, select, step
from .inputs import HeadInputs, ScanInputs, head_inputs, scan_inputs
from .shapes import HEAD_PRESETS, SCAN_PRESETS

# FLOP the float64 oracle may spend; beyond it, correctness is judged on a part of the tokens at full width.
ORACLE_FLOP = {"cpu": 4e11, "cuda": 1e13}
FEWEST_JUDGED = 64


@dataclass(frozen=True)
class Task:
    """``judged`` cuts inputs down to what the oracle can afford, ``spots`` then judges a few rows of the whole;
    ``floor`` is the unavoidable work of the shape.
    """

    name: str
    says: str
    presets: dict[str, list[Any]]
    inputs: Callable[[Any, torch.device], Any]
    contenders: list[Contender]
    oracle: Callable[[Any, str], Outputs]
    yardstick: Callable[[Any, str], Outputs]
    judged: Callable[[Any], Any]
    spots: Callable[[Any, str], tuple[torch.Tensor, torch.Tensor]] | None
    floor: Callable[[Any], Call]
    floor_name: str


def _affordable(inputs: HeadInputs) -> HeadInputs:
    per_row = 8 * inputs.weight.numel()
    most = max(int(ORACLE_FLOP[inputs.hidden.device.type] // per_row), FEWEST_JUDGED)
    return inputs if inputs.tokens <= most else inputs.head(most)


def three_gemms(inputs: HeadInputs) -> Call:
    """The products of a dense head with its gradients, into buffers that are reused: G, 2G, 3G."""
    hidden, weight = inputs.valid(inputs.hidden.detach()), inputs.weight.detach()
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> Outputs:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)
        return {}

    return call


def one_gemm(inputs: HeadInputs) -> Call:
    hidden, weight = inputs.valid(inputs.hidden.detach()), inputs.weight.detach()
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])

    def call() -> Outputs:
        torch.mm(hidden, weight.T, out=logits)
        return {}

    return call


def four_gemms(inputs: HeadInputs) -> Call:
    """The products of two heads, one with its gradients, where no logits are computed twice."""
    policy, reference = three_gemms(inputs), one_gemm(inputs)

    def call() -> Outputs:
        reference()
        return policy()

    return call


def _copy(read: int, written: int, device: torch.device) -> Call:
    """Moves this many bytes in all: a copy of half of them."""
    source = torch.zeros((read + written) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def call() -> Outputs:
        target.copy_(source)
        return {}

    return call


def fresh_gradient(inputs: HeadInputs) -> Call:
    """Writes a dense gradient of the weight."""
    return _copy(0, inputs.weight.nbytes, inputs.weight.device)


def _bytes_of(inputs: ScanInputs, *names: str) -> int:
    mask = 0 if inputs.mask is None else inputs.mask.numel()
    return sum(getattr(inputs, name).nbytes for name in names) + mask


def gae_traffic(inputs: ScanInputs) -> Call:
    return _copy(_bytes_of(inputs, "rewards", "values"), 4 * inputs.values.numel(), inputs.values.device)


def targets_traffic(inputs: ScanInputs) -> Call:
    read = _bytes_of(inputs, "logprobs", "ref_logprobs", "values", "rewards")
    return _copy(read, 4 * inputs.values.numel(), inputs.values.device)


TASKS = {
    task.name: task
    for task in (
        Task(
            "loss",
            "loss and gradients of hidden states, head weight and values, from rollout targets",
            HEAD_PRESETS,
            head_inputs,
            [*ours.LOSS, *plain.LOSS, *peers.LOSS],
            oracle.loss,
            oracle.naive_loss,
            _affordable,
            oracle.some_rows,
            three_gemms,
            "three GEMMs",
        ),
        Task(
            "logprobs",
            "log-probabilities of the taken tokens, as a rollout is scored",
            HEAD_PRESETS,
            head_inputs,
            [*ours.LOGPROBS, *plain.LOGPROBS, *peers.LOGPROBS],
            lambda inputs, _: oracle.logprobs(inputs),
            lambda inputs, _: plain.logprobs_through(plain.naive_logprobs, inputs)(),
            _affordable,
            None,
            one_gemm,
            "one GEMM",
        ),
        Task(
            "select",
            f"logits of {select.IDS} ids per token, and gradients of hidden states and head weight by them",
            HEAD_PRESETS,
            head_inputs,
            select.SELECT,
            lambda inputs, _: oracle.select(inputs, select.ids_of(inputs)),
            lambda inputs, _: select.naive(inputs)(),
            _affordable,
            None,
            fresh_gradient,
            "memory copy",
        ),
        Task(
            "kl",
            "KL of two heads over the whole vocabulary, and gradients of the policy's hidden states and head weight",
            HEAD_PRESETS,
            head_inputs,
            divergence.KL,
            lambda inputs, _: oracle.divergence(inputs, *divergence.reference_of(inputs)),
            lambda inputs, _: divergence.of_rows(divergence.through_logits, inputs)(),
            _affordable,
            None,
            four_gemms,
            "four GEMMs",
        ),
        Task(
            "targets",
            "KLQ targets of a rollout: log-ratios, TD errors, lambda-errors",
            SCAN_PRESETS,
            scan_inputs,
            [*ours.TARGETS, *scans.TARGETS],
            lambda inputs, _: oracle.advantages(inputs, log_ratios=True),
            lambda inputs, _: scans.targets_by(scans.loop, inputs)(),
            lambda inputs: inputs,
            None,
            targets_traffic,
            "memory copy",
        ),
        Task(
            "scan",
            "generalised advantage estimation",
            SCAN_PRESETS,
            scan_inputs,
            [*ours.SCAN, *scans.SCAN],
            lambda inputs, _: oracle.advantages(inputs, log_ratios=False),
            lambda inputs, _: scans.gae_by(scans.loop, inputs)(),
            lambda inputs: inputs,
            None,
            gae_traffic,
            "memory copy",
        ),
        Task(
            "train-step",
            "forward, loss, backward and AdamW of a small language model with a head of this shape",
            step.PRESETS,
            step.step_inputs,
            step.CONTENDERS,
            step.oracle,
            lambda inputs, _: step.training(step.loss_by(plain.naive_logprobs))(inputs)(),
            lambda inputs: inputs,
            None,
            step.body_and_gemms,
            "body and three GEMMs",
        ),
    )
}
