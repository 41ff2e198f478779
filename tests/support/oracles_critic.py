"""GAE, the value loss and the losses of distillation, one token after another, from their definitions. Plain floats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def gae_by_loop(
    rewards: Sequence[float], values: Sequence[float], mask: Sequence[bool], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Advantages and returns of one sequence: the sum of discounted differences, token by token; 0 where masked."""
    steps = [t for t, is_policy in enumerate(mask) if is_policy]
    following = [values[t] for t in steps[1:]] + [0.0] * bool(steps)
    deltas = [rewards[t] + gamma * after - values[t] for t, after in zip(steps, following, strict=True)]
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for k, t in enumerate(steps):
        advantages[t] = math.fsum((gamma * lam) ** (j - k) * deltas[j] for j in range(k, len(steps)))
        returns[t] = advantages[t] + values[t]
    return advantages, returns


def value_point(value: float, old: float, target: float, clip: float | None) -> tuple[float, float]:
    """Loss of a token and its derivative by the value."""
    if clip is not None:
        moved = value - old
        held = old + min(max(moved, -clip), clip)
        if (held - target) ** 2 > (value - target) ** 2:
            return 0.5 * (held - target) ** 2, 0.0
    return 0.5 * (value - target) ** 2, value - target


def prefix_weights_by_loop(discrepancy: Sequence[float], mask: Sequence[bool], gamma: float) -> list[float]:
    """IW-OPD's weight of each policy token of one sequence."""
    total, before, weights = max(math.fsum(d for d, m in zip(discrepancy, mask, strict=True) if m), 1e-8), 0.0, []
    for d, is_policy in zip(discrepancy, mask, strict=True):
        weights.append(1 + gamma * (1 - before / total) if is_policy else 0.0)
        before += d if is_policy else 0.0
    return weights


def reverse_kl_by_loop(student: Sequence[float], teacher: Sequence[float]) -> tuple[float, list[float]]:
    """KL of one token over the columns that the teacher has and one for the rest, and its derivative by each log-prob."""
    used = [column for column, x in enumerate(teacher) if math.isfinite(x)]
    ps, qs = [math.exp(student[c]) for c in used], [math.exp(teacher[c]) for c in used]
    rest, other = 1 - sum(ps), max(1 - sum(qs), 1e-8)
    divergence = sum(p * math.log(p / q) for p, q in zip(ps, qs, strict=True)) + rest * math.log(rest / other)
    slopes = [0.0] * len(student)
    for column, p, q in zip(used, ps, qs, strict=True):
        slopes[column] = p * (math.log(p / q) - math.log(rest / other))
    return divergence, slopes
