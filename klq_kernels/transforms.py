"""What function transforms (``torch.func``, forward-mode differentiation) do to the tensors of a call.

An operator that has a backward alone is silent where PyTorch asks it for something else: under ``vmap`` its inputs do
not show that they need a gradient, and in forward mode the tangent is dropped, as if the derivative were 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.autograd.forward_ad import unpack_dual


def needs_gradient(tensor: Tensor) -> bool:
    """Whether somebody will differentiate by it."""
    while not torch.compiler.is_compiling() and is_batchedtensor(tensor):
        tensor = get_unwrapped(tensor)
    return torch.is_grad_enabled() and tensor.requires_grad


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several tensors, as ``vmap`` and ``is_grads_batched`` make them; those have no memory."""
    if type(tensor) is not Tensor:
        return False  # it is being traced
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


def refuse_tangents(**inputs: Tensor | None) -> None:
    """Raises RuntimeError where forward mode asks for the derivative by one of them."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in inputs.items():
        if tensor is not None and unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{name}: forward-mode differentiation (jvp) is not supported; use backward, or klq_kernels.reference"
            )
