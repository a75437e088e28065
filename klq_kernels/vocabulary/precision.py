"""The settings of PyTorch that our own products run under, whatever the caller's are.

Autocast is off: the operators choose the dtypes themselves. fp32 products are fp32 products: ``allow_tf32`` and
``set_float32_matmul_precision`` let a GPU round their inputs to 10 bits, a CPU to 7, which log-probabilities of a large
vocabulary do not survive. Partial sums of 16-bit products stay fp32: by default a GPU may add those of a split
product, or with ``allow_fp16_accumulation`` all of them, in 16 bits.

The settings are PyTorch's own, for the whole process. They are set for the time of a call, and restored.
"""

from __future__ import annotations

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
    backends: Any = torch.backends
    holder = backends.mkldnn.matmul if device.type == "cpu" else backends.cuda.matmul
    before = {}
    try:
        for name, wanted in SETTINGS.get(device.type, {}).items():
            found = getattr(holder, name)
            if found != wanted:
                before[name] = _to_restore(holder, name, found)
                setattr(holder, name, wanted)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for name, found in before.items():
            setattr(holder, name, found)


def _to_restore(holder: Any, name: str, found: Any) -> Any:
    """The value that restores ``name``: with the setting for split products that it resets, where PyTorch has one."""
    split = getattr(holder, f"{name}_split_k", None)
    return found if split is None else (found, split)
