"""Handing out gradients that were computed in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import backend_for, portable
from ..call.transforms import is_batched

try:  # whether the graph, and so the saved gradient, is kept for another backward
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
    reuse = owned and saved.dtype == dtype and not _graph_is_kept()
    out = saved if reuse else torch.empty_like(saved, dtype=dtype)
    backend = backend_for(saved.device) if type(scale) is Tensor else portable  # a compiler traces plain PyTorch alone
    backend.scale(saved, scale, out)
    return out
