"""Reward shaping: what advantages are computed from. The rewards in the trajectories stay as they were judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from ctpo_megatron.config.advantages import ShapingConfig
from ctpo_megatron.types import TrajectoryGroup


def shaped_rewards(groups: Sequence[TrajectoryGroup], shaping: ShapingConfig) -> list[list[float]]:
    """Rewards [group][trajectory]: as judged, or by `shaping.length`; then minus the penalty of `shaping.overlong`.

    `length` counts the tokens that the policy wrote, which are the ones it can save; `overlong` the whole response, since tool
    output uses up the budget as well.
    """
    rewards = [[trajectory.reward for trajectory in group.trajectories] for group in groups]
    if (length := shaping.length) is not None:
        written = [[trajectory.sampled_length for trajectory in group.trajectories] for group in groups]
        rewards = length_rewards(rewards, written, fraction=length.fraction, alpha=length.alpha, correct_from=length.correct_from)
    if (overlong := shaping.overlong) is not None:
        budget, buffer, penalty = overlong.max_tokens, overlong.buffer, overlong.penalty
        rewards = [
            [
                reward - overlong_penalty(trajectory.response_length, max_tokens=budget, buffer=buffer, penalty=penalty)
                for reward, trajectory in zip(of_group, group.trajectories, strict=True)
            ]
            for of_group, group in zip(rewards, groups, strict=True)
        ]
    return rewards


def overlong_penalty(length: int, *, max_tokens: int, buffer: int, penalty: float = 1.0) -> float:
    """0 up to max_tokens - buffer tokens, from there linearly up to `penalty` at max_tokens (arXiv 2503.14476, section 3.4)."""
    excess = length - (max_tokens - buffer)
    return penalty * min(max(excess / buffer, 0.0), 1.0)


def length_rewards(
    rewards: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]],
    *,
    fraction: float = 0.2,
    alpha: float = 0.6,
    correct_from: float = 1.0,
) -> list[list[float]]:
    """The length rule of GRPO-lambda (arXiv 2505.18086); `rewards` and `lengths` in tokens are [group][trajectory].

    Groups are ranked by their share of correct answers, those with a reward of at least `correct_from`. In the first `fraction`
    of them (rounded, at least one) a correct answer gets 1 - alpha * sigmoid((length - mean) / std), mean and std (population)
    over the group's correct answers; elsewhere it gets 1. A wrong answer gets 0 everywhere.

    Not settled by the paper: groups with equal shares are ranked by the mean length of their correct answers, the longest first,
    having most to save, and never pull in more than `fraction`. Where std is 0, so also for a single correct answer, an answer
    is of average length: 1 - alpha / 2.
    """
    correct = [
        [length for reward, length in zip(*group, strict=True) if reward >= correct_from]
        for group in zip(rewards, lengths, strict=True)
    ]  # the lengths of a group's correct answers
    shares = [len(right) / len(group) for right, group in zip(correct, rewards, strict=True)]
    moments = [(fmean(right), pstdev(right)) if right else (0.0, 0.0) for right in correct]
    ranking = sorted(range(len(rewards)), key=lambda g: (-shares[g], -moments[g][0]))
    top = set(ranking[: max(1, round(fraction * len(ranking)))])
    shaped = []
    for index, group in enumerate(zip(rewards, lengths, strict=True)):
        weight = alpha if index in top else 0.0
        shaped.append(
            [
                1.0 - weight * _relative_length(length, *moments[index]) if reward >= correct_from else 0.0
                for reward, length in zip(*group, strict=True)
            ]
        )
    return shaped


def _relative_length(length: int, mean: float, std: float) -> float:
    """0 (short) to 1 (long): the sigmoid of the standard score; 0.5 where all lengths are equal."""
    return 1.0 / (1.0 + math.exp((mean - length) / std)) if std > 0 else 0.5
