"""How well a guide knows the law of the reward: of what it predicts after each token of the reference's completions.

auroc                the probability that of two prefixes with unlike rewards the one that earned more has the higher
                     predicted mean; ties count half. 0.5 says nothing, 1 everything
explained_variance   1 - Var(reward - predicted mean) / Var(reward)
calibration_error    prefixes in ten equal parts by their predicted mean: the mean distance, in units of reward, between
                     the mean prediction and the mean reward of a part
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = 10


def quality(predicted: Tensor, rewards: Tensor) -> dict[str, float]:
    """The measures of N prefixes, [N] each; of rewards that do not vary, the calibration error alone."""
    predicted, rewards = predicted.double(), rewards.double()
    found = {"calibration_error": calibration_error(predicted, rewards)}
    if len(rewards) and bool((rewards != rewards[0]).any()):
        found["auroc"] = auroc(predicted, rewards)
        found["explained_variance"] = float(1 - (rewards - predicted).var() / rewards.var())
    return found


def auroc(predicted: Tensor, rewards: Tensor) -> float:
    """The share of pairs with unlike rewards that are in order; each pair is counted at the lower of its rewards."""
    ordered = pairs = 0.0
    for level in rewards.unique()[:-1]:
        above, at = rewards > level, rewards == level
        ordered += pairs_in_order(predicted[above], predicted[at])
        pairs += float(above.sum()) * float(at.sum())
    return ordered / pairs


def pairs_in_order(above: Tensor, below: Tensor) -> float:
    """Pairs of one of each in which that of ``above`` is larger, ties half: the Mann-Whitney statistic."""
    ranks = average_ranks(torch.cat([above, below]))
    return float(ranks[: len(above)].sum()) - len(above) * (len(above) + 1) / 2


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def calibration_error(predicted: Tensor, rewards: Tensor) -> float:
    order = predicted.argsort()
    parts = [part for part in order.tensor_split(PARTS) if len(part)]
    distances = [abs(float(predicted[p].mean() - rewards[p].mean())) * len(p) for p in parts]
    return sum(distances) / max(len(predicted), 1)
