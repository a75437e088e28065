"""How well the planner's predictions hold: predicted against measured bytes of naive, fused and sampled losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from klq_kernels.commands import loss_memory

from . import memory
from .contenders import Call
from .contenders.ours import fused, sampled
from .contenders.plain import loss_through, naive_logprobs
from .inputs import head_inputs
from .shapes import Shape

KINDS = ("fused", "sampled", "naive")
CONTENDERS = {"fused": "klq_kernels", "sampled": "klq_kernels, sampled", "naive": "naive"}
CALLS: dict[str, Callable[[Any], Call]] = {
    "fused": fused,
    "sampled": sampled,
    "naive": partial(loss_through, naive_logprobs),
}


def predicted(shape: Shape, device: torch.device, kind: str, positions: int | None = None) -> int:
    """Peak bytes over the inputs, gradients included, as the planner predicts them."""
    problem = loss_memory.Problem(shape.tokens, shape.hidden, shape.vocab, shape.dtype, device, positions=positions)
    if kind == "sampled":
        problem = problem._replace(samples=64)
    return (loss_memory.naive_memory if kind == "naive" else loss_memory.fused_memory)(problem).peak


def measured(shape: Shape, device: torch.device, kind: str) -> int | str:
    """The same by the CUDA allocator, or from a fresh CPU process."""
    if device.type == "cpu":
        return memory.on_cpu("loss", [shape], CONTENDERS[kind])[0]
    inputs = head_inputs(shape, device)
    return memory.on_gpu(CALLS[kind](inputs))


def accuracy(shapes: list[Shape], device: torch.device) -> list[dict[str, Any]]:
    """One entry per shape and kind: predicted and measured bytes and their ratio (None where it did not fit)."""
    out = []
    for shape in shapes:
        for kind in KINDS:
            try:
                found = measured(shape, device, kind)
            except torch.OutOfMemoryError:
                found = "oom"
            guess = predicted(shape, device, kind)
            out.append(
                {
                    "kind": kind,
                    "shape": {**shape._asdict(), "dtype": shape.dtype_name},
                    "predicted_bytes": guess,
                    "measured_bytes": found,
                    "ratio": guess / found if isinstance(found, int) and found else None,
                }
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return out
