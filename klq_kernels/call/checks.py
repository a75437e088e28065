"""The checks that every function of the library makes: a ValueError names the argument and what it should be."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*DTYPES, torch.float64)
# Numbers whose products, and whose inverse, are far from the ends of fp32, in which they are used.
SMALLEST, LARGEST = 1e-30, 1e30


def require(condition: bool, name: str, message: str) -> None:
    """Raises the ValueError that names the argument unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name}: {message}")


def require_tensor(name: str, value: object) -> None:
    """Raises the ValueError that names the argument unless it is a dense tensor.

    A subclass that answers PyTorch's operators itself (DTensor, MaskedTensor ...) is refused: the operators here read
    memory, and would take it for what it is not. PyTorch's own stand-ins for tracing are let through.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: must be a tensor, got {type(value).__name__}")
    if not torch.compiler.is_compiling():
        own = getattr(type(value), "__torch_dispatch__", None)
        if own is not Tensor.__torch_dispatch__ and not isinstance(value, (FakeTensor, FunctionalTensor)):
            raise ValueError(f"{name}: must be a plain tensor, got a {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise ValueError(f"{name}: must be a dense tensor, got {kind}")


def require_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises the ValueError that names the argument where one of two tensors is fake and the other has memory."""
    if not torch.compiler.is_compiling() and isinstance(tensor, FakeTensor) != isinstance(other, FakeTensor):
        kinds = f"is a {type(tensor).__name__}, and {other_name} is a {type(other).__name__}"
        raise ValueError(f"{name}: {kinds}; make all of them under one FakeTensorMode, or none")


def require_float(name: str, tensor: Tensor) -> None:
    """Raises the ValueError that names the argument unless its numbers are of a kind that the scans read."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def require_flag(name: str, value: object) -> None:
    """Raises the ValueError that names the argument unless it is True or False."""
    require(isinstance(value, bool), name, f"must be True or False, got {value!r}")


def require_number(
    name: str, value: float, *, low: float = -LARGEST, high: float = LARGEST, positive: bool = False
) -> None:
    """Checks that a hyperparameter is a number within [low, high], or [``SMALLEST``, high] where it is ``positive``."""
    if positive:
        low = SMALLEST
    # comparisons alone, which torch.compile can trace for numbers that change from call to call (an annealed lam)
    if not (isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high):
        found = (
            f"an int of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > LARGEST else repr(value)
        )
        raise ValueError(f"{name}: must be an int or float in [{low:g}, {high:g}], got {found}")


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, an error that names an argument of a function names the caller's own in its place, by ``names``."""
    try:
        yield
    except ValueError as error:
        name, _, message = str(error).partition(": ")
        if name not in names:
            raise
        raise ValueError(f"{names[name]}: {message}") from error


def looks_into(tensor: Tensor) -> bool:
    """Whether what a tensor holds is checked: on a CPU; on a GPU, where it synchronises, under ``KLQ_CHECK=1``."""
    return tensor.device.type == "cpu" or os.environ.get("KLQ_CHECK", "0") == "1"
