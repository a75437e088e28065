"""What a log says of rollouts, of a cycle or held-out: true means over completions and tokens.

Those of a cycle have the names PPO trainers use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .experience import Experience
from .means import Means
from .objectives import Scored
from .rewards import Scores
from .rollout import Rollout


def completion_statistics(
    rollout: Rollout, scores: Scores, scored: Scored, experience: Experience, tau: float
) -> dict[str, Tensor | float]:
    """Means over the completions of this process.

    objective/kl              nats per completion, sampled: sum of log pi - log pi_ref
    objective/entropy         nats per completion, sampled: -sum of log pi
    objective/rlhf_reward     score - tau KL; non_score_reward is its second part
    val/explained_variance    of the lambda-returns, by V as it was at the rollout
    """
    total = scores.total.to(scored.logprobs.device)
    kl = per_completion(scored.logprobs - experience.ref_logprobs, experience.rows).mean()
    lengths = torch.tensor([float(len(s.completion)) for s in rollout.sequences])
    return {
        "objective/scores": total.mean(),
        "objective/scores_std": total.std(correction=0),
        "objective/kl": kl,
        "objective/non_score_reward": -tau * kl,
        "objective/rlhf_reward": total.mean() - tau * kl,
        "objective/entropy": -per_completion(scored.logprobs, experience.rows).mean(),
        "val/explained_variance": explained_variance(experience),
        "val/num_eos_tokens": float((~rollout.truncated).sum()),
        "completions/mean_length": lengths.mean(),
        "completions/max_length": lengths.max(),
        "completions/truncated": rollout.truncated.float().mean(),
    }


def token_statistics(rollout: Rollout, scored: Scored) -> dict[str, Tensor | float]:
    """Means over the trained tokens of this process.

    policy/entropy_avg        nats, exact, over the whole vocabulary
    rollout/sampler_*         how far the sampler's own log-probs are from the policy's, where it gave them
    """
    out: dict[str, Tensor | float] = {"policy/entropy_avg": scored.entropy.mean()}
    if rollout.sampler_logprobs is not None:
        difference = scored.logprobs - rollout.sampler_logprobs.to(scored.logprobs.device)
        out["rollout/sampler_kl"] = (difference.expm1() - difference).mean()
        out["rollout/sampler_ratio_max"] = difference.exp().max() if len(difference) else 1.0
    return out


def held_out_statistics(rollout: Rollout, scores: Scores, log_ratios: Tensor) -> dict[str, Tensor | float]:
    """Means over the completions of an evaluated batch; ``log_ratios`` [N] are to the reference, per trained token."""
    number = len(rollout.sequences)
    return {
        "reward": scores.total.mean(),
        "reward_square": scores.total.double().square().mean(),
        "kl": log_ratios.sum() / number,
        "length": sum(len(s.completion) for s in rollout.sequences) / number,
        "truncated": rollout.truncated.float().mean(),
    }


def add_rewards(means: Means, scores: Scores, names: list[str]) -> None:
    """Adds the mean of each reward function, ``rewards/NAME``, which is over those completions alone that it scored."""
    for name, each in zip(names, scores.each.unbind(1), strict=True):
        scored = each[~each.isnan()]
        means.add({f"rewards/{name}": scored.mean()}, len(scored))


def per_completion(tokens: Tensor, rows: Tensor) -> Tensor:
    """Sums [S] of packed per-token numbers [N]; ``rows`` [S] are the tokens of each completion."""
    owner = torch.arange(len(rows), device=tokens.device).repeat_interleave(rows.to(tokens.device))
    return tokens.new_zeros(len(rows)).index_add_(0, owner, tokens)


def explained_variance(experience: Experience) -> Tensor | float:
    """1 - Var(R - V) / Var(R); 0 where returns do not vary."""
    _, values, errors = experience.targets
    if len(values) == 0:
        return 0.0
    spread = (errors + values).var(correction=0)
    return torch.where(spread > 0, 1 - errors.var(correction=0) / spread, 0.0)
