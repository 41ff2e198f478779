"""Rewards of a group of samples of one prompt become advantages."""

from __future__ import annotations

import math
from collections.abc import Sequence

EPS = 1e-6


def group_advantages(rewards: Sequence[float], *, normalize_std: bool = True) -> list[float]:
    """Reward minus the group's mean, divided by its unbiased standard deviation + 1e-6 (arXiv 2402.03300).

    Without `normalize_std` only the mean is taken off. A group of one has nothing to compare with: its advantage is its reward.
    """
    count = len(rewards)
    if count == 1:
        return [float(rewards[0])]
    mean = math.fsum(rewards) / count
    centred = [reward - mean for reward in rewards]
    if not normalize_std:
        return centred
    std = math.sqrt(math.fsum(c * c for c in centred) / (count - 1))
    return [c / (std + EPS) for c in centred]
