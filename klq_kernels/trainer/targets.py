"""From scores to lambda-errors: those that the value function learns from, and those of the policy where they differ.

Both come from ``klq_targets``. They may differ in lambda. A group baseline moves the values that the policy's errors
start from by what the other completions of the prompt say of them (``reference.group_offsets``); V learns that itself,
from its own errors.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..returns import klq_targets
from ..types import KLQTargets
from .config import KLQConfig
from .objectives import Scored
from .off_policy import importance_trace


def lambda_errors(
    scored: Scored,
    ref_logprobs: Tensor,
    sampler_logprobs: Tensor | None,
    scores: Tensor,
    cut: Tensor,
    rows: Tensor,
    config: KLQConfig,
    lam: float,
    *,
    grouped: bool = True,
) -> tuple[KLQTargets, Tensor]:
    """(the targets of V, the lambda-errors of the policy), of S completions with N trained tokens.

    Args:
        scored, ref_logprobs: what policy, value function and reference say of them.
        sampler_logprobs: fp32 [N], of the policy that sampled, where it is corrected for.
        scores: fp32 [S], what each completion earns with its last token.
        cut: bool [S], the completions that go on with V of their last state.
        rows: int64 [S] on the CPU, trained tokens of each.
        config: of the run.
        lam: of this cycle.
        grouped: whether ``num_generations`` completions at a time are of one prompt.
    """
    device = scored.logprobs.device
    counts = rows.to(device)
    cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    trace = None
    if sampler_logprobs is not None:
        trace = importance_trace(scored.logprobs, sampler_logprobs, config.trace_clip)
    targets = partial(
        klq_targets, scored.logprobs, ref_logprobs, rewards=scores, tau=config.tau, gamma=config.gamma, trace=trace,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    ends = scored.last_values * cut
    value_lam = lam if config.value_lam is None else config.value_lam
    of_values = targets(values=scored.values, bootstrap_values=ends, lam=value_lam)
    if not config.errors_differ:
        return of_values, of_values.advantages
    values = scored.values
    if config.has_baseline and grouped:
        whole = targets(values=values, bootstrap_values=ends, lam=1.0).advantages
        filled = counts > 0
        first = torch.zeros_like(scores).masked_scatter_(filled, whole[cu_seqlens[:-1].long()[filled]])
        offsets = group_offsets(first, filled, config.num_generations)
        values, ends = values + offsets.repeat_interleave(counts), ends + offsets * cut
    return of_values, targets(values=values, bootstrap_values=ends, lam=lam).advantages


def group_offsets(errors: Tensor, present: Tensor, size: int) -> Tensor:
    """The mean error of the others in the group, fp32 [S]; 0 for a completion without others.

    Args:
        errors: fp32 [S], of whole completions, group by group.
        present: bool [S]; those that were skipped, or have no token, count for nothing.
        size: of a group.
    """
    errors, here = (errors * present).view(-1, size), present.view(-1, size).to(errors.dtype)
    others = here.sum(1, keepdim=True) - here
    return ((errors.sum(1, keepdim=True) - errors) / others.clamp(min=1)).flatten()
