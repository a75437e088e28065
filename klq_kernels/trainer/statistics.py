"""Statistics of rollouts for the log, of a cycle or held-out, over completions and tokens.

Those of a cycle have the names PPO trainers use. A completion that no reward function scored is in none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .experience import Experience
from .means import Means
from .objectives import Scored
from .rewards import Scores
from .rollout import Rollout


def add_cycle(
    means: Means, rollout: Rollout, scores: Scores, scored: Scored, experience: Experience, price: float
) -> None:
    """Adds the statistics of this process's completions and trained tokens.

    ``price`` of a nat is in the unit of the scores as they are: tau, times what they are divided by.

    objective/kl              nats per completion, sampled: sum of log pi - log pi_ref
    objective/entropy         nats per completion, sampled: -sum of log pi
    objective/rlhf_reward     score - price * KL, in the unit of the scores; non_score_reward is its second part
    val/num_eos_tokens        completions of a process in a cycle that ended, on average
    val/explained_variance    of the lambda-returns, by V as it was at the rollout
    completions/skipped       share of the completions that no reward function scored
    policy/entropy_avg        nats per token, exact, over the whole vocabulary
    """
    kept = scores.scored
    total = scores.total[kept]
    kl = per_completion(scored.logprobs - experience.ref_logprobs, experience.rows).cpu()[kept]
    surprise = -per_completion(scored.logprobs, experience.rows).cpu()[kept]
    lengths = torch.tensor([float(len(s.completion)) for s in rollout.sequences])[kept]
    truncated = rollout.truncated[kept].float()
    means.add(
        {
            "objective/scores": total.mean(),
            "objective/kl": kl.mean(),
            "objective/non_score_reward": -price * kl.mean(),
            "objective/rlhf_reward": total.mean() - price * kl.mean(),
            "objective/entropy": surprise.mean(),
            "val/num_eos_tokens": float((truncated == 0).sum()),
            "completions/mean_length": lengths.mean(),
            "completions/truncated": truncated.mean(),
        },
        len(total),
    )
    means.add_deviation("objective/scores_std", total)
    means.add_maxima({"completions/max_length": lengths.max() if len(lengths) else -torch.inf})
    means.add({"completions/skipped": (~kept).float().mean()}, len(kept))
    _, values, errors = experience.targets
    means.add_explained("val/explained_variance", errors, errors + values)
    means.add({"policy/entropy_avg": scored.entropy.mean()}, len(scored.entropy))


def add_sampler(means: Means, rollout: Rollout, scored: Scored) -> None:
    """Adds how far the policy that sampled, mu, is from the policy that learns, pi, as far as it says so.

    rollout/staleness           age of mu's weights in cycles; rollout/staleness_max
    rollout/sampler_kl          KL(mu || pi), nats per token, estimated by pi/mu - 1 - log(pi/mu)
    rollout/sampler_ratio_max   the largest pi/mu
    rollout/ess                 effective share of the tokens under the weights pi/mu, which is 1 where pi = mu
    """
    if rollout.staleness is not None:
        means.add({"rollout/staleness": rollout.staleness.mean()}, len(rollout.staleness))
        means.add_maxima({"rollout/staleness_max": rollout.staleness.max()})
    if rollout.sampler_logprobs is None:
        return
    difference = scored.logprobs.double() - rollout.sampler_logprobs.to(scored.logprobs.device)
    means.add_effective("rollout/ess", difference.exp())
    means.add({"rollout/sampler_kl": (difference.expm1() - difference).mean()}, len(difference))
    means.add_maxima({"rollout/sampler_ratio_max": difference.exp().max() if len(difference) else -torch.inf})


def add_demonstrations(means: Means, scores: Scores, scored: Scored) -> None:
    """Adds the mean score of demonstrations, and log pi of their tokens: demonstrations/scores, /logprob."""
    total = scores.total[scores.scored]
    means.add({"demonstrations/scores": total.mean()}, len(total))
    means.add({"demonstrations/logprob": scored.logprobs.mean()}, len(scored.logprobs))


def add_held_out(means: Means, rollout: Rollout, scores: Scores, log_ratios: Tensor) -> None:
    """Adds an evaluated batch; ``log_ratios`` [N] are to the reference, per trained token."""
    kept = scores.scored
    rows = torch.tensor([s.rows for s in rollout.sequences])
    lengths = torch.tensor([float(len(s.completion)) for s in rollout.sequences])[kept]
    means.add(
        {
            "reward": scores.total[kept].mean(),
            "kl": per_completion(log_ratios, rows).cpu()[kept].mean(),
            "length": lengths.mean(),
            "truncated": rollout.truncated[kept].float().mean(),
        },
        int(kept.sum()),
    )
    means.add_deviation("reward_std", scores.total[kept])


def add_rewards(means: Means, scores: Scores, names: list[str]) -> None:
    """Adds the mean of each reward function, ``rewards/NAME``, which is over those completions alone that it scored."""
    for name, each in zip(names, scores.each.unbind(1), strict=True):
        scored = each[~each.isnan()]
        means.add({f"rewards/{name}": scored.mean()}, len(scored))


def per_completion(tokens: Tensor, rows: Tensor) -> Tensor:
    """Sums [S] of packed per-token numbers [N]; ``rows`` [S] are the tokens of each completion."""
    owner = torch.arange(len(rows), device=tokens.device).repeat_interleave(rows.to(tokens.device))
    return tokens.new_zeros(len(rows)).index_add_(0, owner, tokens)
