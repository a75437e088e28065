"""The most tokens that fit: those that a head trains on with the allocator capped, naive against fused."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from klq_kernels.commands import loss_memory
from klq_kernels.commands.plan.search import most

from . import memory
from .contenders.ours import fused
from .contenders.plain import loss_through, naive_logprobs
from .inputs import HeadInputs
from .shapes import Shape

GIB = 2**30
CAP = 24 * GIB
STEP = 1 / 64  # the answer is found to within this share of the prediction


def cheap_inputs(shape: Shape, device: torch.device) -> HeadInputs:
    """Inputs of the right sizes; what they hold does not change what fits."""
    from klq_kernels import KLQTargets

    n = shape.tokens
    hidden = torch.zeros(n, shape.hidden, dtype=shape.dtype, device=device, requires_grad=True)
    weight = torch.zeros(shape.vocab, shape.hidden, dtype=shape.dtype, device=device, requires_grad=True)
    per_token = torch.zeros(n, device=device)
    return HeadInputs(
        hidden, weight, torch.zeros(n, dtype=torch.int64, device=device), per_token.clone().requires_grad_(),
        KLQTargets(per_token, per_token, per_token), per_token, None, None,
        torch.tensor([0, n], dtype=torch.int32, device=device), shape.softcap,
    )  # fmt: skip


def trains(shape: Shape, device: torch.device, kind: str) -> bool:
    """Whether one loss with its gradients fits."""
    try:
        inputs = cheap_inputs(shape, device)
        (fused(inputs) if kind == "fused" else loss_through(naive_logprobs, inputs))()
        fits = True
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        fits = False
    inputs = None  # type: ignore[assignment]  # nothing may stay allocated for the next attempt
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def predicted_most(shape: Shape, device: torch.device, kind: str, cap: int) -> int:
    """Tokens that should fit into ``cap`` bytes with the inputs, by the planner."""

    def fits(tokens: int) -> bool:
        problem = loss_memory.Problem(tokens, shape.hidden, shape.vocab, shape.dtype, device)
        loss = (loss_memory.fused_memory if kind == "fused" else loss_memory.naive_memory)(problem).peak
        inputs = (tokens + shape.vocab) * shape.hidden * shape.dtype.itemsize + 40 * tokens
        return loss + inputs <= cap

    return most(fits)


def largest(
    shape: Shape,
    device: torch.device,
    kind: str,
    cap: int,
    say: Callable[[str], None],
    allowed: int | None = None,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """The most tokens that trained, in steps of ``STEP``: a bracket around the prediction, then bisection.

    ``allowed`` stands in for an allocator's cap where there is none: more tokens than that count as too many.
    TimeoutError once ``deadline`` (of ``time.monotonic``) has passed: what is known by then is no answer.
    """
    guess = predicted_most(shape, device, kind, cap)
    step = max(int(guess * STEP), 1)

    def attempt(steps: int) -> bool:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{shape.name} {kind}")
        tokens = steps * step
        ok = (allowed is None or tokens <= allowed) and trains(shape._replace(tokens=tokens), device, kind)
        say(f"{shape.name} {kind}: {tokens} tokens {'train' if ok else 'do not fit'}")
        return ok

    low = high = max(guess // step, 1)
    width = 1
    if attempt(low):
        high = low + width
        while attempt(high):
            low, width = high, 2 * width
            high = low + width
    else:
        low = max(high - width, 0)
        while low and not attempt(low):
            high, width = low, 2 * width
            low = max(high - width, 0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if attempt(middle) else (low, middle)
    return {
        "kind": kind,
        "shape": shape.name,
        "hidden": shape.hidden,
        "vocab": shape.vocab,
        "dtype": shape.dtype_name,
        "cap_bytes": cap,
        "tokens": low * step,
        "predicted_tokens": guess,
    }
