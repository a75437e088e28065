"""Function transforms (``torch.func``, forward-mode differentiation): the tensors they wrap, and those to refuse.

An operator that has a backward alone is silent where PyTorch asks it for something else: under ``vmap`` its inputs do
not show that they need a gradient, and in forward mode the tangent is dropped, as if the derivative were 0. One that
has no derivative, since its results are constants of a loss, is silent under ``torch.func.grad`` too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_gradtrackingtensor, maybe_current_level
from torch.autograd import forward_ad


def _peeled(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``vmap``."""
    while is_batchedtensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a gradient by it is needed."""
    return torch.is_grad_enabled() and _peeled(tensor).requires_grad


def _has_tangent(tensor: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    # what is being compiled does not show its tangents
    return torch.compiler.is_compiling() or forward_ad.unpack_dual(_peeled(tensor)).tangent is not None


def refuse_tangents(**inputs: Tensor | None) -> None:
    """Raises RuntimeError where forward mode asks for the derivative by one of them."""
    for name, tensor in inputs.items():
        if tensor is not None and _has_tangent(tensor):
            raise RuntimeError(
                f"{name}: forward-mode differentiation (jvp) is not supported; use backward, or klq_kernels.reference"
            )


def refuse_derivatives(function: str, **inputs: Tensor | None) -> None:
    """Raises RuntimeError where a transform asks ``function``, whose results are constants, for a derivative by one.

    Backward is not refused: a result that requires no gradient says so itself.
    """
    for name, tensor in inputs.items():
        if tensor is not None and (_has_tangent(tensor) or _is_differentiated(tensor)):
            raise RuntimeError(
                f"{name}: {function} is computed without gradient, and neither forward-mode differentiation (jvp) nor "
                "torch.func.grad gets one; use klq_kernels.reference"
            )


def refuse_transforms(function: str, inputs: Iterable[object]) -> None:
    """Raises RuntimeError where ``torch.func.grad``, or what is made of it, asks for the gradient by one of them.

    PyTorch's own message would be about the class behind the function.
    """
    if any(isinstance(each, Tensor) and _is_differentiated(each) for each in inputs):
        raise RuntimeError(
            f"{function}: torch.func.grad and its relatives (vjp, jacrev) are not supported; use backward, "
            "torch.autograd.grad or klq_kernels.reference"
        )


def _is_differentiated(tensor: Tensor) -> bool:
    """Whether ``torch.func.grad``, or what is made of it, follows this tensor."""
    if maybe_current_level() is None:  # torch.compile cannot trace the rest
        return False
    while is_gradtrackingtensor(tensor) or is_batchedtensor(tensor):
        if is_gradtrackingtensor(tensor) and needs_gradient(tensor):
            return True
        tensor = get_unwrapped(tensor)
    return False


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several tensors, as ``vmap`` and ``is_grads_batched`` make them; those have no memory."""
    if type(tensor) is not Tensor:
        return False  # it is being traced
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False
