"""The checks that every function of the library makes: a ValueError names the argument and what it should be."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*DTYPES, torch.float64)


def require(condition: bool, name: str, message: str) -> None:
    """Raises the ValueError that names the argument unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name}: {message}")


def require_tensor(name: str, value: object) -> None:
    """Raises the ValueError that names the argument unless it is a dense tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise ValueError(f"{name}: must be a dense tensor, got {kind}")


def require_float(name: str, tensor: Tensor) -> None:
    """Raises the ValueError that names the argument unless its numbers are of a kind that the scans read."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def require_flag(name: str, value: object) -> None:
    """Raises the ValueError that names the argument unless it is True or False."""
    require(isinstance(value, bool), name, f"must be True or False, got {value!r}")


def require_number(
    name: str, value: float, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> None:
    """Checks that a hyperparameter is a finite number within [low, high] (or (low, high] with ``open_low``)."""
    # comparisons alone, which torch.compile can trace for numbers that change from call to call (an annealed lam)
    ok = isinstance(value, (int, float)) and -math.inf < value < math.inf
    ok = ok and value <= high and (value > low if open_low else value >= low)
    if not ok:
        bounds = f"{'(' if open_low else '['}{low}, {high}]"
        raise ValueError(f"{name}: must be a finite int or float in {bounds}, got {value!r}")


def checks_on_device() -> bool:
    """Whether ``KLQ_CHECK=1`` asks for the checks that cost a GPU synchronisation."""
    return os.environ.get("KLQ_CHECK", "0") == "1"
