"""Every objective, aggregation and mismatch correction once more: plain floats, one token after another, from the definitions.

A slow second reading that `policy_loss` is held against. Nothing of the package is used. An objective returns, for each policy
token t, its loss and the closed form of d(loss_t)/d(logp_t): everything a token takes from other tokens is constant under the
gradient (stop-gradient in the definitions), so no other derivative exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_DRIFT = 20.0  # |log ratio| of one token
MAX_LEVEL = 10.0  # log ratio over several tokens, no lower bound
MIN_PROBABILITY = 1e-8  # in a KL divergence

Points = dict[int, tuple[float, float]]  # policy token -> (loss, d loss / d logp of that token)


@dataclass(frozen=True)
class Row:
    """One whole sequence, a value per token (`top_*`: K values per token). Masked tokens may hold anything, NaN included."""

    logp: list[float]
    old_logp: list[float]
    rollout_logp: list[float]
    advantage: list[float]
    mask: list[bool]
    restart: list[bool]
    top_logp: list[list[float]]
    top_rollout: list[list[float]]

    def policy_tokens(self) -> list[int]:
        return [t for t, is_policy in enumerate(self.mask) if is_policy]

    def segments(self) -> list[list[int]]:
        """Policy tokens, divided where a new policy version begins (which may be at a masked token)."""
        found: list[list[int]] = [[]]
        for t, is_policy in enumerate(self.mask):
            if self.restart[t]:
                found.append([])
            if is_policy:
                found[-1].append(t)
        return found


@dataclass
class Decisions:
    """The comparisons that an oracle took: distance of the nearest from its bound, and which way each went."""

    margin: float = math.inf
    taken: set[tuple[str, bool]] = field(default_factory=set)

    def above(self, name: str, value: float, bound: float) -> bool:
        self.margin = min(self.margin, abs(value - bound))
        if math.isfinite(value) and math.isfinite(bound):
            self.taken.add((name, value > bound))
        return value > bound


def clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def drift(logp: float, anchor: float) -> float:
    return clamp(logp - anchor, -MAX_DRIFT, MAX_DRIFT)


def drift_slope(logp: float, anchor: float, decide: Decisions) -> float:
    """d(drift)/d(logp)."""
    return 0.0 if decide.above("drift", abs(logp - anchor), MAX_DRIFT) else 1.0


def capped_ratio(level: float, decide: Decisions) -> tuple[float, float]:
    """exp of a level over several tokens, and d(level)/d(logp) of the own token, which carries the gradient."""
    slope = 0.0 if decide.above("cap", level, MAX_LEVEL) else 1.0
    return math.exp(min(level, MAX_LEVEL)), slope


def clipped_surrogate(
    advantage: float, ratio: float, slope: float, low: float, high: float, decide: Decisions, dual: float = math.inf
) -> tuple[float, float]:
    """max(-A r, -A clip(r, low, high)), for A < 0 at most -A dual; `slope` is d(log r)/d(logp)."""
    if advantage > 0 and decide.above("high", ratio, high):
        return -advantage * high, 0.0
    if advantage < 0 and decide.above("low", low, ratio):
        return -advantage * low, 0.0
    if advantage < 0 and decide.above("dual", ratio, dual):
        return -advantage * dual, 0.0
    return -advantage * ratio, -advantage * ratio * slope


def clipped_weight(ratio: float, clip_low: float, clip_high: float, decide: Decisions) -> float:
    if decide.above("high", ratio, 1 + clip_high):
        return 1 + clip_high
    if clip_low < 1 and decide.above("low", 1 - clip_low, ratio):
        return 1 - clip_low
    return ratio


def band_measure(row: Row, t: int, band: str) -> float:
    """What a token adds to what CTPO's bounds grow with."""
    if band == "position":
        return 1.0
    if band == "variance":
        return drift(row.logp[t], row.old_logp[t]) ** 2
    if band == "entropy":
        return clamp(-row.old_logp[t], 0.0, MAX_DRIFT)
    ps, qs = [math.exp(x) for x in row.top_logp[t]], [math.exp(x) for x in row.top_rollout[t]]
    ps.append(max(1 - sum(ps), 0.0))
    qs.append(max(1 - sum(qs), 0.0))
    if band == "topk_entropy":
        return -sum(q * math.log(max(q, MIN_PROBABILITY)) for q in qs)
    moves = [math.log(max(p, MIN_PROBABILITY) / max(q, MIN_PROBABILITY)) for p, q in zip(ps, qs, strict=True)]
    mean = sum(q * move for q, move in zip(qs, moves, strict=True))
    return sum(q * (move - mean) ** 2 for q, move in zip(qs, moves, strict=True))


def ctpo(
    row: Row,
    decide: Decisions,
    *,
    ratio: str = "cumulative",
    clip_low: float = 0.025,
    clip_high: float = 0.05,
    dual_clip: float | None = 0.05,
    power: float = 0.5,
    band: str = "position",
    band_unit: float | None = None,
) -> Points:
    points = {}
    measures = {t: band_measure(row, t, band) for t in row.policy_tokens()}
    unit = band_unit or sum(measures.values()) / max(len(measures), 1)
    for segment in row.segments():
        total = measured = 0.0
        for n, t in enumerate(segment, start=1):
            total += drift(row.logp[t], row.old_logp[t])
            measured += measures[t]
            value, slope = capped_ratio(total if ratio == "cumulative" else total / n, decide)
            scale = (measured / unit if unit > 0 else n) ** power
            low, high = math.exp(-clip_low * scale), math.exp(min(clip_high * scale, 700))
            dual = math.inf if dual_clip is None else math.exp(min(dual_clip * scale, 700))
            points[t] = clipped_surrogate(row.advantage[t], value, slope, low, high, decide, dual)
    return points


def grpo(row: Row, decide: Decisions, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = 3.0) -> Points:
    points = {}
    for t in row.policy_tokens():
        ratio = math.exp(drift(row.logp[t], row.old_logp[t]))
        slope = drift_slope(row.logp[t], row.old_logp[t], decide)
        dual = math.inf if dual_clip is None else dual_clip
        points[t] = clipped_surrogate(row.advantage[t], ratio, slope, 1 - clip_low, 1 + clip_high, decide, dual)
    return points


def whole_sequence(row: Row, decide: Decisions, level: float, clip_low: float, clip_high: float) -> Points:
    """One ratio for all tokens; each token carries the gradient of its own log-probability."""
    ratio, slope = capped_ratio(level, decide)
    return {
        t: clipped_surrogate(row.advantage[t], ratio, slope, 1 - clip_low, 1 + clip_high, decide) for t in row.policy_tokens()
    }


def gspo(row: Row, decide: Decisions, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Points:
    drifts = [drift(row.logp[t], row.old_logp[t]) for t in row.policy_tokens()]
    return whole_sequence(row, decide, sum(drifts) / max(len(drifts), 1), clip_low, clip_high)


def sequence(row: Row, decide: Decisions, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Points:
    drifts = [drift(row.logp[t], row.old_logp[t]) for t in row.policy_tokens()]
    return whole_sequence(row, decide, sum(drifts), clip_low, clip_high)


def sapo(row: Row, decide: Decisions, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Points:
    points = {}
    for t in row.policy_tokens():
        advantage = row.advantage[t]
        tau = tau_positive if advantage > 0 else tau_negative
        ratio = math.exp(drift(row.logp[t], row.old_logp[t]))
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        slope = drift_slope(row.logp[t], row.old_logp[t], decide)
        points[t] = -advantage * gate * 4 / tau, -advantage * 4 * gate * (1 - gate) * ratio * slope
    return points


def cispo(row: Row, decide: Decisions, *, clip_low: float = 1.0, clip_high: float = 0.2) -> Points:
    points = {}
    for t in row.policy_tokens():
        weight = clipped_weight(math.exp(drift(row.logp[t], row.old_logp[t])), clip_low, clip_high, decide)
        points[t] = -weight * row.advantage[t] * row.logp[t], -weight * row.advantage[t]
    return points


def gmpo(row: Row, decide: Decisions, *, clip_low: float = 0.4, clip_high: float = 0.4) -> Points:
    tokens = row.policy_tokens()
    clipped, slopes = [], []
    for t in tokens:
        x, slope = drift(row.logp[t], row.old_logp[t]), drift_slope(row.logp[t], row.old_logp[t], decide)
        if row.advantage[t] > 0 and decide.above("high", x, clip_high):
            x, slope = clip_high, 0.0
        elif row.advantage[t] < 0 and decide.above("low", -clip_low, x):
            x, slope = -clip_low, 0.0
        elif row.advantage[t] == 0:
            x, slope = 0.0, 0.0
        clipped.append(x)
        slopes.append(slope)
    mean_ratio = math.exp(sum(clipped) / max(len(clipped), 1))
    # d(R)/d(logp_t) = R slope / count; in the token form the count is left to the aggregation
    losses = [-row.advantage[t] * mean_ratio for t in tokens]
    return {t: (loss, loss * slope) for t, loss, slope in zip(tokens, losses, slopes, strict=True)}


def minpro(row: Row, decide: Decisions, *, clip_low: float = 0.2, clip_high: float = 0.28, form: str = "weight") -> Points:
    points = {}
    for segment in row.segments():
        lowest: float | None = None
        for t in segment:
            own = drift(row.logp[t], row.old_logp[t])
            ratio = math.exp((0.0 if lowest is None else lowest) + own)
            if form == "weight":
                weight = clipped_weight(ratio, clip_low, clip_high, decide)
                points[t] = -weight * row.advantage[t] * row.logp[t], -weight * row.advantage[t]
            else:
                slope = drift_slope(row.logp[t], row.old_logp[t], decide)
                points[t] = clipped_surrogate(row.advantage[t], ratio, slope, 1 - clip_low, 1 + clip_high, decide)
            lowest = own if lowest is None else min(lowest, own)
    return points


def divergence_of(row: Row, t: int, kind: str) -> float:
    """Of the rollout policy (mu, q) from the current one (pi, p) at one token."""
    d = drift(row.logp[t], row.rollout_logp[t])
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        return math.exp(d) - 1 - d
    top, measure = kind.split("_")
    ps, qs = [math.exp(row.logp[t])], [math.exp(row.rollout_logp[t])]
    if top == "topk":
        ps, qs = [math.exp(x) for x in row.top_logp[t]], [math.exp(x) for x in row.top_rollout[t]]
    ps.append(max(1 - sum(ps), 0.0))
    qs.append(max(1 - sum(qs), 0.0))
    if measure == "tv":
        return 0.5 * sum(abs(q - p) for p, q in zip(ps, qs, strict=True))
    ps = [clamp(p, MIN_PROBABILITY, 1 - MIN_PROBABILITY) for p in ps]
    qs = [clamp(q, MIN_PROBABILITY, 1 - MIN_PROBABILITY) for q in qs]
    return sum(q * math.log(q / p) for p, q in zip(ps, qs, strict=True))


def dppo(
    row: Row, decide: Decisions, *, divergence: str = "binary_tv", delta: float = 0.15, ratio_cap: float | None = 5.0
) -> Points:
    points = {}
    for t in row.policy_tokens():
        advantage, d = row.advantage[t], drift(row.logp[t], row.rollout_logp[t])
        leaves = (advantage > 0 and decide.above("up", d, 0)) or (advantage < 0 and decide.above("down", 0, d))
        ratio = math.exp(d)
        if ratio_cap is not None and decide.above("ratio cap", ratio, ratio_cap):
            ratio = ratio_cap
        if leaves and decide.above("divergence", divergence_of(row, t, divergence), delta):
            ratio = 0.0
        points[t] = -advantage * ratio * row.logp[t], -advantage * ratio
    return points


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the order statistics."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def cppo(
    row: Row,
    decide: Decisions,
    *,
    divergence: str = "binary_tv",
    delta: float = 0.15,
    budget: float = 0.015,
    weight_min: float = 0.8,
    adaptive_budget: bool = False,
    adaptive_max: float = 2.0,
    adaptive_quantile: float = 0.9,
    adaptive_factor: float = 1.0,
) -> Points:
    divergences = {t: divergence_of(row, t, divergence) for t in row.policy_tokens()}
    count = len(divergences)
    if adaptive_budget and count:
        measured = adaptive_factor * quantile(list(divergences.values()), adaptive_quantile)
        for name, bound in (("budget low", budget), ("budget high", adaptive_max * budget)):
            decide.above(name, measured, bound)
        budget = clamp(measured, budget, adaptive_max * budget)
    points = {}
    for segment in row.segments():
        spent = weights = 0.0
        for n, t in enumerate(segment, start=1):
            weight = 1 - (1 - weight_min) * (n - 1) / (count - 1) if count > 1 else 1.0
            share = weight * divergences[t]
            allowed = min(delta, delta + budget * weights - spent)
            advantage, d = row.advantage[t], drift(row.logp[t], row.rollout_logp[t])
            leaves = (advantage > 0 and decide.above("up", d, 0)) or (advantage < 0 and decide.above("down", 0, d))
            ratio = math.exp(d)
            if leaves and decide.above("budget", share, allowed):
                ratio = 0.0
            slope = drift_slope(row.logp[t], row.rollout_logp[t], decide)
            points[t] = -advantage * ratio, -advantage * ratio * slope
            spent += share
            weights += weight
    return points


def trm(
    row: Row,
    decide: Decisions,
    *,
    divergence: str = "k3",
    max_divergence: float | None = None,
    mean_divergence: float | None = 0.001,
) -> Points:
    tokens = row.policy_tokens()
    if not tokens:
        return {}
    divergences = [divergence_of(row, t, divergence) for t in tokens]
    over_max = max_divergence is not None and decide.above("max", max(divergences), max_divergence)
    over_mean = mean_divergence is not None and decide.above("mean", sum(divergences) / len(tokens), mean_divergence)
    points = {}
    for t in tokens:
        ratio = 0.0 if over_max or over_mean else math.exp(drift(row.logp[t], row.rollout_logp[t]))
        slope = drift_slope(row.logp[t], row.rollout_logp[t], decide)
        points[t] = -row.advantage[t] * ratio, -row.advantage[t] * ratio * slope
    return points


def drpo(row: Row, decide: Decisions, *, epsilon: float = 12.5) -> Points:
    points = {}
    for t in row.policy_tokens():
        advantage, mu = row.advantage[t], math.exp(row.rollout_logp[t])
        ratio = math.exp(drift(row.logp[t], row.rollout_logp[t]))
        slope = drift_slope(row.logp[t], row.rollout_logp[t], decide)
        loss = -advantage * ratio + abs(advantage) * mu * (ratio - 1) ** 2 / (2 * epsilon)
        sign = (advantage > 0) - (advantage < 0)
        points[t] = loss, -advantage * ratio * (1 - sign * mu * (ratio - 1) / epsilon) * slope
    return points


def kl_of_two(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def kpop(row: Row, decide: Decisions, *, delta: float = 0.05, gate: str = "token", penalty: float = 0.0) -> Points:
    points = {}
    for segment in row.segments():
        largest = total = 0.0
        for t in segment:
            p, q = (clamp(math.exp(x), 1e-6, 1 - 1e-6) for x in (row.logp[t], row.rollout_logp[t]))
            divergence = max(kl_of_two(p, q), kl_of_two(q, p))
            largest, total = max(largest, divergence), total + divergence
            d = drift(row.logp[t], row.rollout_logp[t])
            slope = drift_slope(row.logp[t], row.rollout_logp[t], decide)
            judged = {"token": divergence, "prefix_max": largest, "prefix_sum": total}[gate]
            ratio = 0.0 if decide.above("divergence", judged, delta) else math.exp(d)
            loss = -row.advantage[t] * ratio
            points[t] = loss + penalty * d * d, (loss + 2 * penalty * d) * slope
    return points


def reinforce(row: Row, decide: Decisions) -> Points:
    return {t: (-row.advantage[t] * row.logp[t], -row.advantage[t]) for t in row.policy_tokens()}


OBJECTIVES: dict[str, Callable[..., Points]] = {
    f.__name__: f for f in (ctpo, grpo, gspo, sequence, sapo, cispo, gmpo, minpro, dppo, cppo, trm, drpo, kpop, reinforce)
}
