"""Statistics, loss and gradient of a row of logits in one launch, where the loss has its targets already.

The gradient by a row needs the row's normaliser, so a row is read twice. Here a program reads its row, knows the loss,
and reads the row again at once: while a row per multiprocessor fits into the L2 cache, the second read does not reach
memory. So memory is read once and written once, in place of two reads and a write by two kernels. On-policy there is no
such kernel, since the loss of a row needs all rows after it; soft-capped rows, their entropy and other dtypes, which
would not leave a thread the registers it needs, take the three kernels as well (``updates``). So does a head whose bias
is learnt (``token_major``): the sum over rows, which ``row_grad`` makes as it writes, would be another read here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import LossShape, Residuals, Statistics, Terms
from .klq_residual import loss_and_slopes
from .launch import ROW_UPDATE, on_device
from .row_grad import gradient
from .row_stats import statistics


@triton.jit
def row_update_kernel(
    logits, actions, top, log_total, logp, values, old_logp, old_values, advantages, weights,
    losses, d_logp, d_values, grad_scale, stride, vocab, scale,
    tau, alpha, huber_delta, value_clip, log_ratio_clip,
    LOSS_TYPE: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    action = tl.load(actions + row)
    highest, rest, taken, _ = statistics(base, None, action, stride, vocab, scale, None, False, GROUPS, LANES)
    loss, by_logp, by_value = loss_and_slopes(
        taken - tl.load(old_logp + row), tl.load(values + row) - tl.load(old_values + row), tl.load(advantages + row),
        tau, alpha, huber_delta, value_clip, log_ratio_clip, LOSS_TYPE,
    )  # fmt: skip
    factor = tl.load(grad_scale)
    if weights is not None:
        weight = tl.load(weights + row)
        loss *= weight
        by_logp *= weight
        by_value *= weight
    by_logp *= factor
    tl.store(top + row, highest)
    tl.store(log_total + row, rest)
    tl.store(logp + row, taken)
    tl.store(losses + row, loss)
    tl.store(d_logp + row, by_logp)
    tl.store(d_values + row, by_value * factor)
    tl.debug_barrier()  # nothing is overwritten before every thread has read what it needs of the row
    for start in range(0, stride, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < stride
        x = tl.load(base + cols, mask=inside, other=0.0).to(tl.float32)
        d = gradient(x, start, cols, action, highest, rest, by_logp, -by_logp, None, None, scale, None, BLOCK)
        tl.store(base + cols, d.to(logits.dtype.element_ty), mask=inside)


def updates(logits: Tensor, *, softcap: float | None, entropy: bool) -> bool:
    """Whether ``row_update`` does this, and does it faster: a row for each multiprocessor fits into the L2 cache."""
    if logits.dtype != torch.bfloat16 or softcap is not None or entropy:
        return False
    if not logits.is_cuda:  # interpreted: to be tested
        return True
    if torch.version.hip is not None:  # whose warps have 64 threads: so many are too many for a program
        return False
    device = torch.cuda.get_device_properties(logits.device)
    return logits.stride(0) * logits.element_size() * device.multi_processor_count <= 0.8 * device.L2_cache_size


def row_update(
    logits: Tensor,
    actions: Tensor,
    terms: Terms,
    found: Statistics,
    residuals: Residuals,
    *,
    grad_scale: Tensor,
    shape: LossShape,
    scale: float,
) -> None:
    """``portable.row_stats``, ``portable.klq_residual`` and ``portable.row_grad`` on a chunk of logits, which it turns
    into their gradient. Writes ``found`` (``found.logp`` is ``terms.logp``) and ``residuals``.
    """
    n, vocab = logits.shape
    top, log_total, logp, _ = found
    _, values, old_logp, old_values, advantages, weights = terms
    with on_device(logits):
        row_update_kernel[(n,)](
            logits, actions, top, log_total, logp, values, old_logp, old_values, advantages, weights, *residuals,
            grad_scale, logits.stride(0), vocab, scale, shape.tau, shape.alpha, shape.huber_delta, shape.value_clip,
            shape.log_ratio_clip, LOSS_TYPE=shape.loss_type, **ROW_UPDATE.sizes, **ROW_UPDATE.options,
        )  # fmt: skip
