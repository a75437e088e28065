"""Sees every tensor that is allocated, also inside the library's own operators."""

from __future__ import annotations

from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from klq_kernels.ops import fused_loss, klq_loss, linear_kl, linear_logprobs, linear_select, scans
from klq_kernels.ops.operator import Operator

DEFINITIONS = [
    op.definition if isinstance(op, Operator) else op
    for module in (fused_loss, klq_loss, linear_kl, linear_logprobs, linear_select, scans)
    for op in vars(module).values()
    if isinstance(op, (Operator, CustomOpDef))
]
OPERATORS = {op._opoverload: op for op in DEFINITIONS}


class Watch(TorchDispatchMode):
    """Records (operator name, bytes of storage) of each allocation made while it is active, and every operator run."""

    def __init__(self) -> None:
        super().__init__()
        self.allocations: list[tuple[str, int]] = []
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls.append(str(func))
        if func in OPERATORS:  # step inside: to the dispatcher they are opaque
            with self:
                return OPERATORS[func]._init_fn(*args, **kwargs)
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in known:
                self.allocations.append((str(func), tensor.untyped_storage().nbytes()))
        return out

    def largest(self) -> int:
        return max((size for _, size in self.allocations), default=0)

    def products(self) -> int:
        """How many matrix products ran."""
        return sum(call.startswith(("aten.mm", "aten.addmm")) for call in self.calls)

    def at_least(self, size: int) -> list[tuple[str, int]]:
        return [a for a in self.allocations if a[1] >= size]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
