"""How answers are judged."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from ctpo_megatron.config.base import Section


class MathReward(Section):
    r"""1.0 where the last \boxed{} equals the answer by the rules of docs/rewards.md, else 0.0."""

    type: Literal["math"] = "math"
    timeout_s: PositiveFloat = 5.0
    """Time to compare one answer; beyond it the reward is 0 and `reward/undecided` counts it."""
