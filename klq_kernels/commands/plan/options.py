"""What the options of ``klq plan`` mean: names of dtypes, rates in the units of data sheets, memory of a GPU."""

from __future__ import annotations

import torch

from ...call.checks import require, require_number
from .run import Run
from .timing import Rates

DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,  # as the trainer names them
}  # fmt: skip
GIB_OF_80_GB = 78  # of an 80 GB card, once CUDA and NCCL have taken theirs


def dtype(option: str, name: str) -> torch.dtype:
    """Raises ValueError naming the option where there is no such dtype."""
    require(name in DTYPES, option, f"must be one of {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def require_one(first: str, one: object, second: str, other: object) -> None:
    """Raises ValueError where both options are given."""
    require(one is None or other is None, first, f"is given beside {second}; leave one of them out")


def rates(known: Rates, gpus_per_node: int, **given: float | None) -> Rates:
    """The known rates, but for those that are given, in TFLOP/s and GB/s. Raises ValueError where one is not > 0."""
    for option, value in given.items():
        if value is not None:
            require_number(option, value, positive=True)
    units = {"tflops": ("flop", 1e12)}
    fields = {}
    for option, value in given.items():
        if value is not None:
            name, unit = units.get(option, (option.removesuffix("_bandwidth"), 1e9))
            fields[name] = value * unit
    return known._replace(**fields, gpus_per_node=gpus_per_node)


def budget(gib: float | None, run: Run) -> int | None:
    """Bytes of a GPU that a step may take; None: not asked."""
    if gib is not None:
        require_number("budget_gib", gib, positive=True)
    elif run.gpus > 1 and run.device.type == "cuda":
        gib = GIB_OF_80_GB
    return None if gib is None else int(gib * 2**30)
