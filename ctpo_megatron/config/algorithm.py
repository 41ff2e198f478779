"""What is optimised: the objective, its aggregation, and how rewards become advantages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from ctpo_megatron.config.base import Section

Aggregation = Literal["token-mean", "sequence-mean", "sequence-sum"]


class CtpoObjective(Section):
    """Cumulative Token Policy Optimization, arXiv 2605.07331: prefix ratios with bounds that grow as position**power."""

    type: Literal["ctpo"] = "ctpo"
    ratio: Literal["cumulative", "geomean"] = "cumulative"
    """`cumulative`: product of token ratios up to t. `geomean`: its t-th root."""
    clip_low: NonNegativeFloat = 0.025
    """Lower bound of the log-ratio at the first token; scaled by position**power."""
    clip_high: NonNegativeFloat = 0.05
    """Upper bound of the log-ratio at the first token; scaled by position**power."""
    dual_clip: NonNegativeFloat | None = 0.05
    """Log-ratio beyond which a negative advantage stops growing; scaled likewise. null: no dual clip."""
    power: float = 0.5
    """Growth of the bounds with the position. 0: a fixed window."""


class GrpoObjective(Section):
    """Token-level ratios with PPO clipping (arXiv 2402.03300; clip-higher of DAPO; dual clip of arXiv 1912.09729)."""

    type: Literal["grpo"] = "grpo"
    clip_low: NonNegativeFloat = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: NonNegativeFloat = 0.2
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: PositiveFloat | None = 3.0
    """Bound of the ratio where the advantage is negative. null: none."""


Objective = Annotated[CtpoObjective | GrpoObjective, Field(discriminator="type")]


class GroupAdvantage(Section):
    """Reward minus the mean of its group, optionally divided by the group's standard deviation."""

    type: Literal["group"] = "group"
    normalize_std: bool = True
    """Divide by the (unbiased) standard deviation of the group plus 1e-6."""


class AlgorithmConfig(Section):
    """The policy-gradient step."""

    objective: Objective = CtpoObjective()
    """Which surrogate loss; `type` picks it."""
    aggregation: Aggregation = "sequence-mean"
    """How per-token losses become one number. CTPO's paper uses sequence-mean."""
    advantage: GroupAdvantage = GroupAdvantage()
    """How rewards become advantages."""
