"""Function transforms (``torch.func``, forward-mode differentiation): the tensors they wrap, and those to refuse.

An operator that has a backward alone is silent where PyTorch asks it for something else: under ``vmap`` its inputs do
not show that they need a gradient, and in forward mode the tangent is dropped, as if the derivative were 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.autograd import forward_ad


def _peeled(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``vmap``."""
    while is_batchedtensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a gradient by it is needed."""
    return torch.is_grad_enabled() and _peeled(tensor).requires_grad


def refuse_tangents(**inputs: Tensor | None) -> None:
    """Raises RuntimeError where forward mode asks for the derivative by one of them."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in inputs.items():
        # what is being compiled does not show its tangents
        if tensor is not None and (
            torch.compiler.is_compiling() or forward_ad.unpack_dual(_peeled(tensor)).tangent is not None
        ):
            raise RuntimeError(
                f"{name}: forward-mode differentiation (jvp) is not supported; use backward, or klq_kernels.reference"
            )


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several tensors, as ``vmap`` and ``is_grads_batched`` make them; those have no memory."""
    if type(tensor) is not Tensor:
        return False  # it is being traced
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False
