"""Advantages from the rewards of one group: the samples of one prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

EPS = 1e-6


def group_moments(rewards: Sequence[float], *, normalize_std: bool = True) -> tuple[float, float]:
    """What is taken off each reward of a group, and what the rest is divided by: mean and unbiased standard deviation + 1e-6.

    Without `normalize_std` the divisor is 1. A group of one has nothing to compare with: 0 and 1.
    """
    count = len(rewards)
    if count == 1:
        return 0.0, 1.0
    mean = math.fsum(rewards) / count
    if not normalize_std:
        return mean, 1.0
    return mean, math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (count - 1)) + EPS


def group_advantages(rewards: Sequence[float], *, normalize_std: bool = True) -> list[float]:
    """Reward minus the group's mean, divided by its unbiased standard deviation + 1e-6 (arXiv 2402.03300).

    Without `normalize_std` only the mean is taken off (Dr. GRPO, arXiv 2503.20783). In a group of one it is the reward itself.
    """
    mean, scale = group_moments(rewards, normalize_std=normalize_std)
    return [(reward - mean) / scale for reward in rewards]


def rloo_advantages(rewards: Sequence[float]) -> list[float]:
    """Reward minus the mean of the group's other rewards, which is n / (n - 1) times reward minus mean (arXiv 2402.14740).

    In a group of one the advantage is the reward.
    """
    count = len(rewards)
    factor = count / (count - 1) if count > 1 else 1.0
    return [factor * centred for centred in group_advantages(rewards, normalize_std=False)]
