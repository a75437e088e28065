"""Right answers in float64, a block of rows at a time: closed-form gradients through softmax, nothing of the library's.

The loss of a token is a function of its log-probability and value; autograd differentiates that small function, and the
chain rule through the head is written out: d_logits = d_logp (onehot - softmax).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from klq_kernels.reference import klq_residual_loss

from .contenders import Outputs, gradients
from .contenders.plain import TAU, naive_logprobs
from .inputs import HeadInputs, ScanInputs

BLOCK_ELEMENTS = 2**25  # of float64 logits


def _blocks(inputs: HeadInputs) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """(rows' flat positions, hidden, actions, z, dz/d(hidden @ weight.T)), valid rows only."""
    positions = torch.arange(inputs.actions.numel(), device=inputs.actions.device)
    rows = inputs.valid(positions)
    weight = inputs.weight.detach().double()
    for index in rows.split(max(BLOCK_ELEMENTS // weight.shape[0], 1)):
        hidden = inputs.hidden.detach()[index].double()
        z = hidden @ weight.T
        slope = torch.ones((), dtype=z.dtype, device=z.device)
        if inputs.softcap is not None:
            t = torch.tanh(z / inputs.softcap)
            z, slope = inputs.softcap * t, 1 - t * t
        yield index, hidden, inputs.actions[index], z, slope


def logprobs(inputs: HeadInputs) -> Outputs:
    """float64 log-probabilities of the valid rows."""
    with torch.no_grad():
        found = [(z.log_softmax(1).gather(1, a[:, None])).squeeze(1) for _, _, a, z, _ in _blocks(inputs)]
    return {"logprobs": torch.cat(found)}


def _klq(logp: Tensor, values: Tensor, inputs: HeadInputs) -> Tensor:
    old_logprobs, old_values, advantages = (t.to(logp.dtype) for t in inputs.valid_targets())
    return klq_residual_loss(logp - old_logprobs, values - old_values, advantages, tau=TAU).mean()


def _cross_entropy(logp: Tensor, values: Tensor, inputs: HeadInputs) -> Tensor:
    return -logp.mean()


def _policy_gradient(logp: Tensor, values: Tensor, inputs: HeadInputs) -> Tensor:
    return -(inputs.valid(inputs.scores) * torch.exp(logp - logp.detach())).mean()


OBJECTIVES: dict[str, Callable[[Tensor, Tensor, HeadInputs], Tensor]] = {
    "klq": _klq,
    "cross-entropy": _cross_entropy,
    "policy gradient": _policy_gradient,
}


def loss(inputs: HeadInputs, objective: str) -> Outputs:
    """The loss and its gradients by hidden, weight and (for KLQ) values."""
    logp = logprobs(inputs)["logprobs"].requires_grad_()
    values = inputs.valid(inputs.values.detach()).double().requires_grad_()
    of_rows = gradients(OBJECTIVES[objective](logp, values, inputs), logp=logp, values=values)
    d_hidden = torch.zeros_like(inputs.hidden, dtype=torch.float64)
    d_weight = torch.zeros_like(inputs.weight, dtype=torch.float64)
    weight = inputs.weight.detach().double()
    done = 0
    with torch.no_grad():
        for index, hidden, actions, z, slope in _blocks(inputs):
            g = of_rows["logp"][done : done + index.numel(), None]
            done += index.numel()
            d = -g * z.softmax(1)
            d.scatter_add_(1, actions[:, None], g)
            d *= slope
            d_hidden[index] = d @ weight
            d_weight += d.T @ hidden
    out = {"loss": of_rows["loss"], "hidden": d_hidden, "weight": d_weight}
    if "values" in of_rows:
        out["values"] = torch.zeros_like(inputs.values, dtype=torch.float64)
        out["values"][inputs.valid(torch.arange(inputs.actions.numel(), device=weight.device))] = of_rows["values"]
    return out


def select(inputs: HeadInputs, ids: Tensor) -> Outputs:
    """Half the mean square of the logits of ids [M, k], and its gradients by hidden and weight."""
    d_hidden = torch.zeros_like(inputs.hidden, dtype=torch.float64)
    d_weight = torch.zeros_like(inputs.weight, dtype=torch.float64)
    weight = inputs.weight.detach().double()
    squares, count = d_weight.new_zeros(()), inputs.tokens * ids.shape[1]
    with torch.no_grad():
        for index, hidden, _, z, slope in _blocks(inputs):
            chosen = z.gather(1, ids[index])
            squares += chosen.square().sum()
            d = torch.zeros_like(z).scatter_add_(1, ids[index], chosen / count) * slope
            d_hidden[index] = d @ weight
            d_weight += d.T @ hidden
    return {"loss": 0.5 * squares / count, "hidden": d_hidden, "weight": d_weight}


def divergence(inputs: HeadInputs, ref_hidden: Tensor, ref_weight: Tensor) -> Outputs:
    """The mean KL(pi || pi_ref), and its gradients by hidden and weight."""
    d_hidden = torch.zeros_like(inputs.hidden, dtype=torch.float64)
    d_weight = torch.zeros_like(inputs.weight, dtype=torch.float64)
    weight, ref_head = inputs.weight.detach().double(), ref_weight.double()
    total = d_weight.new_zeros(())
    with torch.no_grad():
        for index, hidden, _, z, slope in _blocks(inputs):
            ref = ref_hidden[index].double() @ ref_head.T
            if inputs.softcap is not None:
                ref = inputs.softcap * torch.tanh(ref / inputs.softcap)
            logp = z.log_softmax(1)
            ratio = logp - ref.log_softmax(1)
            kl = (logp.exp() * ratio).sum(1, keepdim=True)
            total += kl.sum()
            d = logp.exp() * (ratio - kl) * slope / inputs.tokens
            d_hidden[index] = d @ weight
            d_weight += d.T @ hidden
    return {"loss": total / inputs.tokens, "hidden": d_hidden, "weight": d_weight}


def some_rows(inputs: HeadInputs, objective: str, count: int = 64) -> tuple[Tensor, Tensor]:
    """(flat positions, float64 d_hidden there) for a few rows out of all.

    Objectives are means over tokens, so each row's gradient is its own but for the count. This finds what goes wrong
    only at full size, such as offsets beyond 32 bits.
    """
    n = inputs.tokens
    rows = torch.linspace(0, n - 1, min(count, n), device=inputs.actions.device).long()
    found = loss(inputs.only(rows), objective)["hidden"] * (rows.numel() / n)
    return (rows if inputs.rows is None else inputs.rows[rows]), found


def both_sides(inputs: HeadInputs, found: Outputs, count: int = 64) -> tuple[Tensor, Tensor]:
    """A few entries of (W^T d_weight, d_hidden^T hidden), [H, H] each, with W's columns scaled to length 1.

    They are equal whatever the loss: both gradients are products with the same d_logits, d_weight = d_logits^T hidden
    and d_hidden = d_logits W. So all of d_weight is held against d_hidden at a small part of what computing it costs.
    """
    weight, hidden = inputs.weight.detach(), inputs.hidden.detach()
    columns = torch.linspace(0, weight.shape[1] - 1, min(count, weight.shape[1]), device=weight.device).long()
    scale = weight[:, columns].double().norm(dim=0)
    left = (weight[:, columns].double() / scale).T @ found["weight"][:, columns].double()
    right = (found["hidden"][:, columns].double() / scale).T @ hidden[:, columns].double()
    return left, right


def naive_loss(inputs: HeadInputs, objective: str) -> Outputs:
    """The same computed the plain way in the inputs' dtype: the yardstick of what error is normal."""
    rows = inputs.valid(inputs.hidden), inputs.weight, inputs.valid(inputs.actions), inputs.softcap
    loss = OBJECTIVES[objective](naive_logprobs(*rows).float(), inputs.valid(inputs.values), inputs)
    return gradients(loss, hidden=inputs.hidden, weight=inputs.weight, values=inputs.values)


def reverse_scan(delta: Tensor, decay: Tensor, mask: Tensor | None = None) -> Outputs:
    """float64 S_t = delta_t + decay_t S_{t+1} of each row [B, T], a masked token skipped and 0."""
    keep = torch.ones_like(delta, dtype=torch.bool) if mask is None else mask
    delta, decay = delta.double(), decay.double().expand_as(delta)
    out = torch.zeros_like(delta)
    following = torch.zeros_like(delta[:, 0])
    for t in range(delta.shape[1] - 1, -1, -1):
        following = torch.where(keep[:, t], delta[:, t] + decay[:, t] * following, following)
        out[:, t] = torch.where(keep[:, t], following, 0.0)
    return {"scan": out}


def advantages(inputs: ScanInputs, *, log_ratios: bool) -> Outputs:
    """float64 lambda-errors, one time step after the other; with ``log_ratios`` those of KLQ, without plain GAE."""
    keep = torch.ones_like(inputs.values, dtype=torch.bool) if inputs.mask is None else inputs.mask
    values, rewards = inputs.values.double(), inputs.rewards.double()
    q = values + inputs.tau * (inputs.logprobs.double() - inputs.ref_logprobs.double()) if log_ratios else values
    out = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(following)
    for t in range(values.shape[1] - 1, -1, -1):
        error = rewards[:, t] + inputs.gamma * next_value - q[:, t] + inputs.gamma * inputs.lam * following
        following = torch.where(keep[:, t], error, following)
        next_value = torch.where(keep[:, t], values[:, t], next_value)
        out[:, t] = torch.where(keep[:, t], error, 0.0)
    return {"advantages": out}
