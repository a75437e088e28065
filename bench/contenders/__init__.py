"""The contenders: one small adapter per implementation, imported only when it is asked to run.

A contender turns a task's inputs into a callable; the callable does the whole job once and returns its named results
(the loss and the gradients, say), which are held against float64 before anything is timed. A contender
that optimises another objective than the task's own (a fused cross-entropy cannot do KLQ) names it in ``computes``, and
is checked on that.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Call = Callable[[], Outputs]


@dataclass(frozen=True)
class Contender:
    """``module`` must be importable, or the contender is reported as missing with ``install``."""

    name: str
    make: Callable[[Any], Call]
    computes: str = "klq"
    module: str | None = None
    install: str = ""
    needs_gpu: bool = False
    noise: float = 0.0  # relative error that the head's gradients may have beyond rounding: they are an estimate

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        if self.module is not None and not _importable(self.module):
            return self.install
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        return None


def _importable(module: str) -> bool:
    parent, _, attribute = module.partition(":")
    try:
        if importlib.util.find_spec(parent) is None:
            return False
    except ModuleNotFoundError:  # a parent package is missing
        return False
    return not attribute or hasattr(importlib.import_module(parent), attribute)


def gradients(loss: Tensor, **inputs: Tensor) -> Outputs:
    """The loss and its gradients by the named inputs: those that require one and that it depends on."""
    leaves = {name: leaf for name, leaf in inputs.items() if leaf.requires_grad}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    return {"loss": loss.detach(), **named}
