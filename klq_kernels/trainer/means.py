"""Means that stay true over micro-batches of different sizes, and over processes.

A value is added with the number of things it is a mean of; only when a log is due are the sums brought together, in one
reduction over all processes and one copy from the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class Means:
    """Named running means."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor | float], count: float) -> None:
        """Means over ``count`` things each; 0-d tensors on any device are not waited for.

        A mean over nothing counts for nothing, but its name does: processes must agree on the names.
        """
        for name, value in values.items():
            mean = torch.as_tensor(value, dtype=torch.float64).detach()
            total = mean * count if count else torch.zeros_like(mean)
            self._sums[name] = self._sums[name].to(total.device) + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0.0) + count

    def state(self) -> dict[str, dict[str, float]]:
        """What has been added since the last drain, for a checkpoint."""
        return {"sums": {n: total.item() for n, total in self._sums.items()}, "counts": dict(self._counts)}

    def load_state(self, state: dict[str, dict[str, float]]) -> None:
        self._sums = {n: torch.tensor(total, dtype=torch.float64) for n, total in state["sums"].items()}
        self._counts = dict(state["counts"])

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last drain, without those of nothing. Every process must call it."""
        names = sorted(self._sums)
        if not names:
            return {}
        rows = [torch.stack([self._sums[n].cpu(), torch.tensor(self._counts[n], dtype=torch.float64)]) for n in names]
        sums, counts = accelerator.reduce(torch.stack(rows).to(accelerator.device), reduction="sum").cpu().unbind(1)
        self._sums, self._counts = {}, {}
        return {n: (s / c).item() for n, s, c in zip(names, sums, counts, strict=True) if c > 0}
