"""Handing out gradients that were computed in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.transforms import is_batched
from ..vocabulary.chunking import STRIP_ROWS

try:  # tells whether the graph, and so the saved gradient, is wanted again after this backward
    from torch._C._autograd import _get_current_graph_task_keep_graph as _graph_is_kept
except ImportError:  # then never overwrite what was saved

    def _graph_is_kept() -> bool:
        return True


def scaled_gradient(saved: Tensor, scale: Tensor, dtype: torch.dtype, *, owned: bool) -> Tensor:
    """saved * scale (fp32, 0-d) in ``dtype``, rounded once.

    Where ``saved`` is ``owned``, no one but autograd holding it, and the graph is not kept for another backward, it is
    overwritten.

    Raises:
        RuntimeError: under ``create_graph=True``. What was computed in the forward is a constant to autograd, and a
            second derivative through it would be silently wrong.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the KLQ loss computes its gradient in the forward, so that gradient cannot be differentiated again: "
            "backward without create_graph, or use klq_kernels.reference"
        )
    if is_batched(scale):
        return (saved.float() * scale).to(dtype)
    reuse = owned and not _graph_is_kept()
    if saved.is_cuda:  # as a one-element tensor the scale stays fp32, and the kernel rounds on its way out
        out = saved if reuse and saved.dtype == dtype else torch.empty_like(saved, dtype=dtype)
        return torch.mul(saved, scale.reshape(1), out=out)
    if saved.dtype == dtype:
        if not reuse:
            return saved * scale
        known = type(scale) is Tensor and not scale.is_meta  # one that is traced has no number
        return saved if known and scale.item() == 1.0 else saved.mul_(scale)
    out = torch.empty_like(saved, dtype=dtype)
    for part, into in zip(saved.split(STRIP_ROWS), out.split(STRIP_ROWS), strict=True):
        into.copy_(part * scale)  # the product stays in cache: one pass over memory
    return out
