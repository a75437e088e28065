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
    """The share of pairs with unlike rewards that are in order, ties half."""
    _, ranks, of_rank = rewards.unique(return_inverse=True, return_counts=True)
    _, places, of_place = predicted.unique(return_inverse=True, return_counts=True)
    order = (places * len(of_rank) - ranks).argsort()  # of equal predictions the highest reward is first
    both = (places * len(of_rank) + ranks).unique(return_counts=True)[1]
    tied = pairs_of(of_place) - pairs_of(both)
    unlike = len(rewards) * (len(rewards) - 1) // 2 - pairs_of(of_rank)
    return (ascents(ranks[order]) + tied / 2) / unlike


def pairs_of(counts: Tensor) -> int:
    """How many pairs there are within groups of these sizes."""
    return int((counts * (counts - 1) // 2).sum())


def ascents(ranks: Tensor) -> int:
    """Pairs i < j with ranks[i] < ranks[j], of N whole numbers, in O(N log N) for each bit of the largest.

    Two numbers differ first in one bit, where the smaller has a 0: so the pairs are counted bit by bit, among the
    numbers whose higher bits are equal.
    """
    found = 0
    for bit in range(int(ranks.max()).bit_length()):
        group, order = (ranks >> (bit + 1)).sort(stable=True)
        ones = ranks[order] >> bit & 1
        zeros_before = (1 - ones).cumsum(0) - (1 - ones)
        of_group = zeros_before - zeros_before[torch.searchsorted(group, group)]
        found += int((of_group * ones).sum())
    return found


def calibration_error(predicted: Tensor, rewards: Tensor) -> float:
    order = predicted.argsort()
    parts = [part for part in order.tensor_split(PARTS) if len(part)]
    distances = [abs(float(predicted[p].mean() - rewards[p].mean())) * len(p) for p in parts]
    return sum(distances) / max(len(predicted), 1)
