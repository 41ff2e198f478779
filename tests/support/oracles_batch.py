"""From the token losses of `oracles` to the loss of a packed batch: corrections, aggregations, and the gradient of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.support.oracles import OBJECTIVES, Decisions, Row, clamp, drift

Options = Mapping[str, object]

RANGES = {"truncate": (0.0, 2.0), "mask": (0.5, 2.0), "icepop": (0.5, 5.0)}  # default low, high


@dataclass(frozen=True)
class Expected:
    """What `policy_loss` must return for a batch; `token_loss` and `gradient` over the packed stream."""

    loss: float
    token_loss: list[float]
    gradient: list[float]
    decisions: Decisions


def correction_levels(row: Row, level: str) -> dict[int, float]:
    """log(old / rollout) at the asked level, per policy token."""
    mismatch = {t: drift(row.old_logp[t], row.rollout_logp[t]) for t in row.policy_tokens()}
    if level == "token":
        return mismatch
    if level == "prefix":
        prefixes = {}
        for segment in row.segments():
            total = 0.0
            for t in segment:
                total += mismatch[t]
                prefixes[t] = total
        return prefixes
    total = sum(mismatch.values())
    if level == "geometric":
        total /= max(len(mismatch), 1)
    return dict.fromkeys(mismatch, total)


def correction_factors(row: Row, correction: Options | None, decide: Decisions) -> dict[int, float]:
    if correction is None:
        return dict.fromkeys(row.policy_tokens(), 1.0)
    kind = str(correction["type"])
    low, high = (float(correction.get(bound, default)) for bound, default in zip(("low", "high"), RANGES[kind], strict=True))  # type: ignore[arg-type]
    factors = {}
    for t, level in correction_levels(row, str(correction.get("level", "token"))).items():
        weight = math.exp(clamp(level, -20, 20))
        below, over = decide.above("correction low", low, weight), decide.above("correction high", weight, high)
        outside = below or over
        factors[t] = (clamp(weight, low, high) if kind == "truncate" else 0.0) if outside else weight
    return factors


def delight_of(row: Row, t: int, delight: Options) -> float:
    """The logistic function of advantage times surprisal."""
    eta, largest = float(delight.get("eta", 1.0)), delight.get("max_surprisal") or math.inf  # type: ignore[arg-type]
    product = row.advantage[t] * min(-row.logp[t], float(largest)) / eta  # type: ignore[arg-type]
    weight = 1 / (1 + math.exp(-product)) if product > -700 else 0.0
    return 2 * weight if delight.get("centred") else weight


def balanced_weights(rows: Sequence[Row], normalizer: float | None, groups: Sequence[int]) -> list[float]:
    """(sequences of the family / sequences of the group) / tokens of the family / groups; a family shares group and sign."""
    families: dict[int, tuple[int, int]] = {}
    for i, row in enumerate(rows):
        signs = sum((row.advantage[t] > 0) - (row.advantage[t] < 0) for t in row.policy_tokens())
        if any(row.mask):
            families[i] = (groups[i], (signs > 0) - (signs < 0))
    if normalizer is None:
        normalizer = len({group for group, _ in families.values()})
    weights = [0.0] * len(rows)
    for i, (group, sign) in families.items():
        of_group = [j for j, family in families.items() if family[0] == group]
        of_family = [j for j in of_group if families[j][1] == sign]
        tokens = sum(sum(rows[j].mask) for j in of_family)
        weights[i] = len(of_family) / len(of_group) / tokens / normalizer
    return weights


def sequence_weights(
    rows: Sequence[Row], aggregation: str | Options, normalizer: float | None, groups: Sequence[int] | None
) -> list[float]:
    """The weight that every token of a sequence has in the loss."""
    if aggregation == "balanced":
        return balanced_weights(rows, normalizer, groups or [])
    counts = [sum(row.mask) for row in rows]
    if normalizer is None:
        normalizer = sum(counts) if aggregation == "token-mean" else sum(count > 0 for count in counts)
    if isinstance(aggregation, Mapping):
        normalizer *= float(aggregation["tokens"])  # type: ignore[arg-type]
    return [
        0.0 if count == 0 else 1 / normalizer / (count if aggregation == "sequence-mean" else 1)  # no policy token: no part
        for count in counts
    ]


def expected_loss(
    objective: Options,
    rows: Sequence[Row],
    *,
    aggregation: str | Options = "sequence-mean",
    normalizer: float | None = None,
    groups: Sequence[int] | None = None,
    correction: Options | None = None,
    delight: Options | None = None,
) -> Expected:
    options = {name: value for name, value in objective.items() if name != "type"}
    decide = Decisions()
    loss, token_loss, gradient = [], [], []
    for row, weight in zip(rows, sequence_weights(rows, aggregation, normalizer, groups), strict=True):
        points = OBJECTIVES[str(objective["type"])](row, decide, **options)
        factors = correction_factors(row, correction, decide)
        for t in range(len(row.mask)):
            value, slope = points.get(t, (0.0, 0.0))
            factor = factors.get(t, 0.0) * (delight_of(row, t, delight) if t in factors and delight is not None else 1.0)
            loss.append(weight * factor * value)
            token_loss.append(factor * value)
            gradient.append(weight * factor * slope)
    return Expected(math.fsum(loss), token_loss, gradient, decide)
