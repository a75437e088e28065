"""The settings of PyTorch that our own products run under, whatever the caller's are.

Autocast is off: the operators choose the dtypes themselves. fp32 products are fp32 products: ``allow_tf32`` and
``set_float32_matmul_precision`` let a GPU round their inputs to 10 bits, a CPU to 7, which log-probabilities of a large
vocabulary do not survive. Partial sums of 16-bit products stay fp32: by default a GPU may add those of a split
product, or with ``allow_fp16_accumulation`` all of them, in 16 bits.

The settings are PyTorch's own, for the whole process. They are set for the time of a call, and restored.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# by device: what to set, and to what
SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {"fp32_precision": "ieee"},
    "cuda": {
        "fp32_precision": "ieee",
        "allow_bf16_reduced_precision_reduction": False,
        "allow_fp16_reduced_precision_reduction": False,
        "allow_fp16_accumulation": False,
    },
}


_lock = threading.Lock()
_calls: dict[str, int] = {}  # that run now, by device
_before: dict[str, dict[str, Any]] = {}  # the caller's settings, to be restored after the last of them


@contextmanager
def own_settings(device: torch.device) -> Iterator[None]:
    """Runs products on this device with the settings above. Of calls in several threads at once the first sets them,
    and the last restores what it found.
    """
    try:
        _enter(device.type)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _leave(device.type)


def _enter(kind: str) -> None:
    with _lock:
        _calls[kind] = _calls.get(kind, 0) + 1
        if _calls[kind] > 1:
            return
        holder = _holder(kind)
        before = _before[kind] = {}
        for name, wanted in SETTINGS.get(kind, {}).items():
            found = getattr(holder, name)
            if found != wanted:
                before[name] = _to_restore(holder, name, found)
                setattr(holder, name, wanted)


def _leave(kind: str) -> None:
    with _lock:
        _calls[kind] -= 1
        if not _calls[kind]:
            for name, found in _before.pop(kind).items():
                setattr(_holder(kind), name, found)


def _holder(kind: str) -> Any:
    backends: Any = torch.backends
    return backends.mkldnn.matmul if kind == "cpu" else backends.cuda.matmul


def _to_restore(holder: Any, name: str, found: Any) -> Any:
    """The value that restores ``name``: with the setting for split products that it resets, where PyTorch has one."""
    split = getattr(holder, f"{name}_split_k", None)
    return found if split is None else (found, split)
