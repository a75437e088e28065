"""The settings of PyTorch that our own products run under, whatever the caller's are.

Autocast is off: the operators choose the dtypes themselves. fp32 products are fp32 products: ``allow_tf32`` and
``set_float32_matmul_precision`` let a GPU round their inputs to 10 bits, a CPU to 7, which log-probabilities of a large
vocabulary do not survive. Partial sums of 16-bit products stay fp32: by default a GPU may add those of a split
product, or with ``allow_fp16_accumulation`` all of them, in 16 bits.

The settings are PyTorch's own, for the whole process. They are set for the time of a call, and restored. Calls on
several threads overlap: the first of them that finds a setting otherwise keeps what it was, the last to end restores
it.
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


@contextmanager
def own_settings(device: torch.device) -> Iterator[None]:
    """Runs products on this device with the settings above."""
    calls = CALLS.get(device.type)
    try:
        if calls is not None:
            calls.enter()
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if calls is not None:
            calls.leave()


class _Calls:
    """The calls on one kind of device that are running, on any thread, and the settings to restore after the last."""

    def __init__(self, kind: str) -> None:
        self._kind, self._lock = kind, threading.Lock()
        self._running = 0
        self._before: dict[str, Any] = {}

    @property
    def _holder(self) -> Any:
        backends: Any = torch.backends
        return backends.mkldnn.matmul if self._kind == "cpu" else backends.cuda.matmul

    def enter(self) -> None:
        holder = self._holder
        with self._lock:
            self._running += 1
            for name, wanted in SETTINGS[self._kind].items():
                found = getattr(holder, name)
                if found != wanted:
                    self._before.setdefault(name, _to_restore(holder, name, found))
                    setattr(holder, name, wanted)

    def leave(self) -> None:
        with self._lock:
            self._running -= 1
            if self._running == 0 and self._before:
                for name, found in self._before.items():
                    setattr(self._holder, name, found)
                self._before = {}


CALLS = {kind: _Calls(kind) for kind in SETTINGS}


def _to_restore(holder: Any, name: str, found: Any) -> Any:
    """The value that restores ``name``: with the setting for split products that it resets, where PyTorch has one."""
    split = getattr(holder, f"{name}_split_k", None)
    return found if split is None else (found, split)
