"""Means of a few seeds, with 95% confidence intervals by Student's t distribution.

Two algorithms that ran on the same seeds (the same prompts in the same order) are compared by the interval of their
differences, seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

# The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom.
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
Z_975 = 1.959964


class Interval(NamedTuple):
    """A mean, give or take ``half`` (None with a single number: nothing is known of its spread)."""

    mean: float
    half: float | None

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below 0, else 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1

    def text(self, digits: int = 3) -> str:
        half = "" if self.half is None else f" ± {self.half:.{digits}f}"
        return f"{self.mean:.{digits}f}{half}"


def t_975(degrees: int) -> float:
    """The quantile; beyond the table by its expansion around the normal distribution's, good to four digits."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    return Z_975 + (Z_975**3 + Z_975) / (4 * degrees) + (5 * Z_975**5 + 16 * Z_975**3 + 3 * Z_975) / (96 * degrees**2)


def interval(numbers: Sequence[float]) -> Interval:
    """The mean of independent numbers with its 95% interval."""
    if len(numbers) < 2:
        return Interval(fmean(numbers), None)
    return Interval(fmean(numbers), t_975(len(numbers) - 1) * stdev(numbers) / math.sqrt(len(numbers)))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The interval of the mean difference of numbers that belong together."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def win_share(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How often ours is better than its opposite number, ties counted half."""
    return fmean(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True))
