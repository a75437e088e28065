"""Statistics that stay true over micro-batches of different sizes, over logs, and over processes.

Each kind merges by its own rule. A mean is added with the number of things it is a mean of. A maximum is the largest of
maxima. A standard deviation, a root mean square and an explained variance are functions of means, so the means are
kept, and the function is taken of the merged ones. Only when a log is due are the sums brought together, in one
reduction over all processes and one copy from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

Values = Mapping[str, "Tensor | float"]


def _deviation(mean: float, square: float) -> float:
    return math.sqrt(max(square - mean**2, 0.0))


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0))


def _explained(error: float, error_square: float, value: float, value_square: float) -> float:
    """1 - Var(error) / Var(value); 0 where values do not vary."""
    spread = value_square - value**2
    return 1 - (error_square - error**2) / spread if spread > 1e-12 * max(value_square, 1e-30) else 0.0


def _effective(weight: float, square: float) -> float:
    """(sum of w)^2 / (n * sum of w^2): the share of n weighted samples that as many equal ones would be worth."""
    return weight**2 / square if square > 0 else 1.0


# Statistics that are functions of means, by the mark between their name and the names of those means.
DERIVED: dict[str, Callable[..., float]] = {
    "std": _deviation,
    "rms": _root,
    "explained": _explained,
    "effective": _effective,
}
MARK = "|"


class Means:
    """Named running statistics."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(self, values: Values, count: float) -> None:
        """Means over ``count`` things each; 0-d tensors on any device are not waited for.

        A mean over nothing counts for nothing, but its name does: processes must agree on the names.
        """
        for name, value in values.items():
            mean = torch.as_tensor(value, dtype=torch.float64).detach()
            total = mean * count if count else torch.zeros_like(mean)
            self._sums[name] = self._sums[name].to(total.device) + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0.0) + count

    def add_maxima(self, values: Values) -> None:
        """Largest elements so far."""
        for name, value in values.items():
            self._maxima[name] = max(self._maxima.get(name, -math.inf), float(value))

    def add_deviation(self, name: str, values: Tensor) -> None:
        """The standard deviation of all values, however they are divided."""
        self._add_derived(name, "std", {"mean": values, "square": values.double().square()})

    def add_rms(self, name: str, rms: Tensor | float, count: float) -> None:
        """A root mean square over ``count`` things."""
        square = torch.as_tensor(rms, dtype=torch.float64).square()
        self.add({f"{name}{MARK}rms{MARK}square": square}, count)

    def add_explained(self, name: str, errors: Tensor, values: Tensor) -> None:
        """1 - Var(errors) / Var(values)."""
        parts = {"a": errors, "b": errors.double().square(), "c": values, "d": values.double().square()}
        self._add_derived(name, "explained", parts)

    def add_effective(self, name: str, weights: Tensor) -> None:
        """The effective share of weighted samples, in (0, 1]."""
        self._add_derived(name, "effective", {"mean": weights, "square": weights.double().square()})

    def _add_derived(self, name: str, rule: str, parts: dict[str, Tensor]) -> None:
        for part, values in parts.items():
            self.add({f"{name}{MARK}{rule}{MARK}{part}": values.double().mean()}, values.numel())

    def state(self) -> dict[str, dict[str, float]]:
        """Everything added since the last drain, for a checkpoint."""
        sums = {n: total.item() for n, total in self._sums.items()}
        return {"sums": sums, "counts": dict(self._counts), "maxima": dict(self._maxima)}

    def load_state(self, state: dict[str, dict[str, float]]) -> None:
        self._sums = {n: torch.tensor(total, dtype=torch.float64) for n, total in state["sums"].items()}
        self._counts = dict(state["counts"])
        self._maxima = dict(state.get("maxima", {}))

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The statistics of all processes since the last drain, less those of nothing. Every process must call it."""
        means = self._merged_means(accelerator)
        maxima = self._merged_maxima(accelerator)
        self._sums, self._counts, self._maxima = {}, {}, {}
        plain = {name: mean for name, mean in means.items() if MARK not in name}
        parts: dict[tuple[str, str], list[float]] = {}
        for name in sorted(means):
            if MARK in name:
                final, rule, _ = name.split(MARK)
                parts.setdefault((final, rule), []).append(means[name])
        return plain | maxima | {name: DERIVED[rule](*values) for (name, rule), values in parts.items()}

    def _merged_means(self, accelerator: Accelerator) -> dict[str, float]:
        names = sorted(self._sums)
        if not names:
            return {}
        rows = [torch.stack([self._sums[n].cpu(), torch.tensor(self._counts[n], dtype=torch.float64)]) for n in names]
        sums, counts = accelerator.reduce(torch.stack(rows).to(accelerator.device), reduction="sum").cpu().unbind(1)
        return {n: (s / c).item() for n, s, c in zip(names, sums, counts, strict=True) if c > 0}

    def _merged_maxima(self, accelerator: Accelerator) -> dict[str, float]:
        names = sorted(self._maxima)
        if not names:
            return {}
        mine = torch.tensor([[self._maxima[n] for n in names]], dtype=torch.float64, device=accelerator.device)
        found: Any = accelerator.gather(mine)
        largest = found.cpu().amax(0).tolist()
        return {n: x for n, x in zip(names, largest, strict=True) if x > -math.inf}
