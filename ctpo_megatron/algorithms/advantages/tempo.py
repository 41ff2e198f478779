"""TEMPO (arXiv 2509.18314): token-level credit from the prefix tree that the responses of a group form.

The value V(p) of a prefix p is the mean reward of the responses that begin with p. Along a response it changes only where
responses part, so a tree of G responses is a sorted list, the lengths that neighbours share, and at most G (G - 1) changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ctpo_megatron.algorithms.advantages.group import group_moments


def tempo_advantages(
    responses: Sequence[Sequence[int]], rewards: Sequence[float], *, normalize_std: bool = True
) -> list[list[float]]:
    """A_t = (R - mean(R) + V(o_<=t) - V(o_<t)) / (std(R) + 1e-6), one per token of each response, tool output included.

    `responses` are the token ids [n_i] of one group, all lists or all tuples; std is unbiased, and 1 without `normalize_std`.
    In a group of one every advantage is the reward.
    """
    mean, scale = group_moments(rewards, normalize_std=normalize_std)
    advantages = []
    for response, reward, steps in zip(responses, rewards, value_steps(responses, rewards), strict=True):
        values = [(reward - mean) / scale] * len(response)
        for position, step in steps.items():
            values[position] = (reward - mean + step) / scale
        advantages.append(values)
    return advantages


def value_steps(responses: Sequence[Sequence[int]], rewards: Sequence[float]) -> list[dict[int, float]]:
    """For each response, V(o_<=t) - V(o_<t) by position t, at the tokens after which fewer responses share the prefix.

    A response that ends where others go on gets no change there: it has no token that would carry it.
    """
    order = sorted(range(len(responses)), key=lambda number: tuple(responses[number]))
    shared = [common_prefix(responses[a], responses[b]) for a, b in pairwise(order)]  # shared[k]: of the k-th and next
    steps: list[dict[int, float]] = [{} for _ in responses]
    nodes = [(0, len(order))]  # half-open ranges of `order`: the responses below a node of the tree
    while nodes:
        first, last = nodes.pop()
        if last - first < 2:
            continue
        value = _mean(rewards, order[first:last])
        depth = min(shared[first : last - 1])  # the responses of this node part after so many tokens
        cuts = [first, *(k + 1 for k in range(first, last - 1) if shared[k] == depth), last]
        for child in pairwise(cuts):
            members = order[slice(*child)]
            step = _mean(rewards, members) - value
            for member in members:
                if len(responses[member]) > depth:
                    steps[member][depth] = step
            nodes.append(child)
    return steps


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two responses share from their beginning."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(position for position, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def _mean(rewards: Sequence[float], members: Sequence[int]) -> float:
    return math.fsum(rewards[member] for member in members) / len(members)
