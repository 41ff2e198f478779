"""From the groups of a rollout batch to an advantage for every token that the policy wrote."""

from __future__ import annotations

from collections.abc import Sequence

from ctpo_megatron.algorithms.advantages.group import group_advantages, rloo_advantages
from ctpo_megatron.algorithms.advantages.reinforce import outcome_returns, whiten
from ctpo_megatron.algorithms.advantages.shaping import shaped_rewards
from ctpo_megatron.algorithms.advantages.tempo import tempo_advantages
from ctpo_megatron.config.advantages import (
    Advantage,
    GaeAdvantage,
    GroupAdvantage,
    ReinforceAdvantage,
    RlooAdvantage,
    ShapingConfig,
    TempoAdvantage,
)
from ctpo_megatron.types import Trajectory, TrajectoryGroup

NO_SHAPING = ShapingConfig()

TokenAdvantages = list[list[float]]  # [trajectory][policy token] of one group


def compute_advantages(
    groups: Sequence[TrajectoryGroup], advantage: Advantage, shaping: ShapingConfig = NO_SHAPING
) -> list[TokenAdvantages]:
    """Advantages [group][trajectory][policy token], in order, of a WHOLE rollout batch: shaping and whitening look across groups.

    Tool tokens have no entry, tokens of branches come last; a trajectory in which the policy wrote nothing has an empty list.
    `groups` are not changed. Those of `gae` are zero here: the trainer makes them, of rewards and of its critic's values.
    """
    rewards = shaped_rewards(groups, shaping)
    match advantage:
        case GroupAdvantage(normalize_std=normalize):
            scalars = [group_advantages(of_group, normalize_std=normalize) for of_group in rewards]
            return _to_tokens(groups, scalars)
        case RlooAdvantage():
            return _to_tokens(groups, [rloo_advantages(of_group) for of_group in rewards])
        case ReinforceAdvantage():
            return _reinforce(groups, rewards, advantage)
        case TempoAdvantage(normalize_std=normalize):
            return [_tempo(group, of_group, normalize) for group, of_group in zip(groups, rewards, strict=True)]
        case GaeAdvantage():
            return _to_tokens(groups, [[0.0] * len(of_group) for of_group in rewards])
    raise TypeError(f"advantage is a {type(advantage).__name__}; allowed: the sections of config.advantages.Advantage")


def _to_tokens(groups: Sequence[TrajectoryGroup], scalars: Sequence[Sequence[float]]) -> list[TokenAdvantages]:
    """One number per trajectory, repeated for each token that the policy wrote in it."""
    return [
        [[value] * trajectory.sampled_length for trajectory, value in zip(group.trajectories, of_group, strict=True)]
        for group, of_group in zip(groups, scalars, strict=True)
    ]


def _reinforce(
    groups: Sequence[TrajectoryGroup], rewards: Sequence[Sequence[float]], config: ReinforceAdvantage
) -> list[TokenAdvantages]:
    if config.baseline == "group":
        rewards = [group_advantages(of_group, normalize_std=False) for of_group in rewards]
    returns = [
        outcome_returns(reward, length, config.gamma)
        for group, of_group in zip(groups, rewards, strict=True)
        for trajectory, reward in zip(group.trajectories, of_group, strict=True)
        for length in trajectory.sampled_lengths  # a branch ends with the reward too
    ]
    whitened = iter(whiten(returns))
    return [
        [[value for _ in trajectory.sampled_lengths for value in next(whitened).tolist()] for trajectory in group.trajectories]
        for group in groups
    ]


def _tempo(group: TrajectoryGroup, rewards: Sequence[float], normalize_std: bool) -> TokenAdvantages:
    """Tool output is part of the paths through the tree, but a change of value on one of its tokens is credited to no token.

    Branches are no paths, since they continue another prompt: their tokens have what the whole attempt has among its group.
    """
    responses = [[token for turn in trajectory.turns for token in turn.token_ids] for trajectory in group.trajectories]
    advantages = tempo_advantages(responses, rewards, normalize_std=normalize_std)
    whole = group_advantages(rewards, normalize_std=normalize_std)
    return [
        _written(trajectory, values) + [value] * sum(trajectory.sampled_lengths[1:])
        for trajectory, values, value in zip(group.trajectories, advantages, whole, strict=True)
    ]


def _written(trajectory: Trajectory, values: Sequence[float]) -> list[float]:
    """Those of the response's `values` that stand at tokens of the policy."""
    kept: list[float] = []
    start = 0
    for turn in trajectory.turns:
        end = start + len(turn.token_ids)
        if turn.role == "assistant":
            kept += values[start:end]
        start = end
    return kept
