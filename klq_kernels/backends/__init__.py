"""The choice of the backend that runs the row operations on a device: Triton, the compiled extension, or plain PyTorch.

CUDA and ROCm tensors take the Triton kernels; CPU tensors the compiled extension where it is built, and otherwise plain
PyTorch; any other device plain PyTorch. ``KLQ_BACKEND=torch|native|triton`` overrides the choice (Triton on CPU tensors
needs ``TRITON_INTERPRET=1`` and is for testing the kernels, not for use).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

BACKENDS = {"torch": f"{__name__}.portable", "native": f"{__name__}.native", "triton": f"{__name__}.triton"}


@cache
def why_unavailable(name: str) -> str | None:
    """None where a backend can be loaded here, else the reason in a few words."""
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name == "native":
        from . import native

        return native.WHY_UNAVAILABLE
    return None


@cache
def load(name: str) -> ModuleType:
    """The backend module of this name. Raises ValueError where it is unknown or cannot be loaded here."""
    if name not in BACKENDS:
        raise ValueError(f"KLQ_BACKEND: must be one of {', '.join(BACKENDS)}, got {name!r}")
    reason = why_unavailable(name)
    if reason is not None:
        raise ValueError(f"KLQ_BACKEND: {name} is not available: {reason}")
    return importlib.import_module(BACKENDS[name])


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def backend_name(device: torch.device) -> str:
    """The backend that tensors on this device use."""
    forced = os.environ.get("KLQ_BACKEND")
    if forced:
        serves = {"native": device.type == "cpu", "triton": device.type == "cuda" or _interpreting()}
        if not serves.get(forced, True):
            raise ValueError(f"KLQ_BACKEND: {forced} does not run on {device.type} tensors")
        return forced
    preferred = {"cuda": "triton", "cpu": "native"}.get(device.type)
    return preferred if preferred is not None and why_unavailable(preferred) is None else "torch"


def backend_for(device: torch.device) -> ModuleType:
    """The module whose row operations run on this device."""
    return load(backend_name(device))


def vocabulary_major(device: torch.device) -> bool:
    """Whether logits on this device are stored entry by entry of the vocabulary (``vocabulary.vocabulary_major``)."""
    return backend_for(device).VOCABULARY_MAJOR
