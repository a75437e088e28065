"""Returns and targets, backward scans over time (``reverse_scan``, ``gae``, ``lambda_returns``, ``klq_targets``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .call.checks import require_float, require_number, require_tensor
from .call.group import agree, group_of
from .call.layout import Layout, Packing, layout_of
from .call.transforms import refuse_derivatives, refuse_tangents, refuse_transforms
from .ops import scans, spans
from .types import KLQTargets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def reverse_scan(
    delta: Tensor,
    decay: Tensor | float,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    packing: Packing | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """The reverse first-order linear recurrence A_t = delta_t + decay_t A_{t+1}, differentiable.

    A is 0 beyond the end of each sequence. A masked token is stepped over: t + 1 is the next valid token.

    Args:
        delta: [B, T], or [N] with ``cu_seqlens``; fp32, bf16 or fp16.
        decay: a number, or a tensor of delta's shape.
        mask: bool, delta's shape; False tokens take no part, whatever they hold.
        cu_seqlens: int32 [B + 1], makes the layout packed.
        packing: a ``pack(...)`` in place of mask and cu_seqlens.
        process_group: a torch.distributed group, or a DeviceMesh of one dimension, whose ranks share the time of every
            sequence (context parallelism): each passes a span of each of the B sequences, of any length, also none,
            in the order of the ranks, and gets its part of the result (``ops.spans``). Not under ``torch.compile``.

    Returns:
        fp32, delta's shape, 0 at masked tokens.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong.
        RuntimeError: in forward mode, and under ``torch.func.grad``.
    """
    layout = layout_of(delta, mask=mask, cu_seqlens=cu_seqlens, packing=packing, name="delta")
    flat = layout.flat("delta", delta)
    if isinstance(decay, Tensor) and decay.dim() > 0:
        decays = layout.flat("decay", decay)
    elif isinstance(decay, Tensor):
        require_tensor("decay", decay)
        require_float("decay", decay)
        decays = decay.reshape(1).to(delta.device)
    else:
        require_number("decay", decay)
        decays = torch.full((1,), decay, dtype=torch.float32, device=delta.device)
    refuse_tangents(delta=delta, decay=decays)
    refuse_transforms("reverse_scan", (delta, decays))
    group = group_of(process_group)
    if group is None:
        return scans.reverse_scan(flat, decays, *layout.scan_args()).reshape(delta.shape)
    alike = {"sequences": layout.cu_seqlens.numel() - 1, "requires_grad": (delta.requires_grad, decays.requires_grad)}
    agree(group, delta.device, alike)
    return spans.reverse_scan(flat, decays, *layout.scan_args(), group).reshape(delta.shape)


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    packing: Packing | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16), without gradient.

    A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t.

    Args:
        rewards: per token ([B, T] or [N]), or [B]: one score per sequence, landing on its last valid token (packed,
            with N = B, what is [N] is per token).
        values: [B, T] or [N].
        gamma, lam: discount and trace decay, in [0, 1].
        bootstrap_values: [B], V beyond the last valid token where the sequence was truncated, 0 where it terminated.
        mask, cu_seqlens, packing, process_group: as in ``reverse_scan``. All ranks pass the same bootstrap values and
            scores per sequence, which belong to its last valid token, on whichever rank that is.

    Returns:
        fp32, the shape of values, 0 at masked tokens.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong.
        RuntimeError: in forward mode, and under ``torch.func.grad``.
    """
    layout = layout_of(values, mask=mask, cu_seqlens=cu_seqlens, packing=packing, name="values")
    inputs = _scan_inputs(
        "gae", layout, None, None, values, rewards, None, bootstrap_values,
        process_group, tau=0.0, gamma=gamma, lam=lam,
    )  # fmt: skip
    return scans.lambda_errors(*inputs).reshape(layout.shape)


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    packing: Packing | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """TD(lambda) returns: ``gae`` + values (arguments, result and errors as there), without gradient."""
    layout = layout_of(values, mask=mask, cu_seqlens=cu_seqlens, packing=packing, name="values")
    inputs = _scan_inputs(
        "lambda_returns", layout, None, None, values, rewards, None, bootstrap_values,
        process_group, tau=0.0, gamma=gamma, lam=lam,
    )  # fmt: skip
    if layout.mask is None:
        return scans.lambda_errors(*inputs).reshape(layout.shape).add_(values.detach())
    _, valid_values, advantages = scans.klq_targets(*inputs)
    return advantages.add_(valid_values).reshape(layout.shape)


def klq_targets(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    rewards: Tensor,
    *,
    tau: float = 0.05,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
    trace: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    packing: Packing | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
) -> KLQTargets:
    """Rollout targets of KLQ (arXiv 2508.17000, eq. 13-14 and 7), without gradient.

    A_t = delta_t + gamma lam c_{t+1} A_{t+1}, delta_t = r_t + gamma V_{t+1} - Q_t,
    Q_t = tau (logprobs_t - ref_logprobs_t) + V_t.

    Args:
        logprobs, ref_logprobs: log pi and log pi_b of the taken tokens, [B, T] or [N], at the training temperature.
        values: V of the state before each token, same shape.
        rewards: per token, or [B]: one score per sequence, landing on its last valid token (packed, with N = B, what
            is [N] is per token).
        tau: strength of the KL regularisation, > 0.
        gamma, lam: discount and trace decay, in [0, 1].
        bootstrap_values: [B], V beyond the last valid token where the sequence was truncated, 0 where it terminated.
        trace: c_t per token (Retrace), same shape; 1 where None.
        mask, cu_seqlens, packing, process_group: as in ``gae``.

    Returns:
        ``KLQTargets(old_logprobs, old_values, advantages)``: fp32, the caller's layout, 0 at masked tokens.
        They share no memory with the arguments.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong.
        RuntimeError: in forward mode, and under ``torch.func.grad``.
    """
    layout = layout_of(logprobs, mask=mask, cu_seqlens=cu_seqlens, packing=packing, name="logprobs")
    require_tensor("ref_logprobs", ref_logprobs)
    inputs = _scan_inputs(
        "klq_targets", layout, logprobs, ref_logprobs, values, rewards, trace, bootstrap_values, process_group,
        tau=tau, gamma=gamma, lam=lam,
    )  # fmt: skip
    return KLQTargets(*(t.reshape(layout.shape) for t in scans.klq_targets(*inputs)))


def _scan_inputs(
    function: str,
    layout: Layout,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    values: Tensor,
    rewards: Tensor,
    trace: Tensor | None,
    bootstrap_values: Tensor | None,
    process_group: ProcessGroup | DeviceMesh | None,
    *,
    tau: float,
    gamma: float,
    lam: float,
) -> tuple[Any, ...]:
    """The checked arguments of ``scans.lambda_errors`` and ``scans.klq_targets``, without their gradients."""
    if logprobs is not None:
        require_number("tau", tau, positive=True)
    require_number("gamma", gamma, low=0.0, high=1.0)
    require_number("lam", lam, low=0.0, high=1.0)
    per_token, scores = layout.rewards(rewards)
    tail = scans.tail_values(
        layout.cu_seqlens, layout.per_sequence("bootstrap_values", bootstrap_values), scores, gamma
    )
    columns = (
        layout.flat_or_none("logprobs", logprobs),
        layout.flat_or_none("ref_logprobs", ref_logprobs),
        layout.flat("values", values).detach(),
        per_token,
        layout.flat_or_none("trace", trace),
    )
    refuse_derivatives(
        function, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, rewards=rewards, trace=trace,
        bootstrap_values=bootstrap_values,
    )  # fmt: skip
    group = group_of(process_group)
    if group is not None:
        names = ("logprobs", "ref_logprobs", "values", "rewards", "trace")
        given = [name for name, column in zip(names, columns, strict=True) if column is not None]
        alike = {"sequences": tail.numel(), "tau": tau, "gamma": gamma, "lam": lam, "given": given}
        agree(group, tail.device, alike, given=(tail.view(torch.int32),))
        tail = spans.tail_values(group, columns, tail, *layout.scan_args(), tau, gamma, lam)
    return *columns, tail, *layout.scan_args(), tau, gamma, lam
