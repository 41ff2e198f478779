"""How rewards are shaped and become advantages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from ctpo_megatron.config.base import Section
from ctpo_megatron.config.critic import CriticConfig


class GroupAdvantage(Section):
    """Reward minus the mean of its group, optionally divided by the group's standard deviation (GRPO, arXiv 2402.03300)."""

    type: Literal["group"] = "group"
    normalize_std: bool = True
    """Divide by the (unbiased) standard deviation of the group plus 1e-6. false: Dr. GRPO's advantage (arXiv 2503.20783)."""


class RlooAdvantage(Section):
    """Reward minus the mean of the group's other rewards: REINFORCE with the leave-one-out baseline (arXiv 2402.14740)."""

    type: Literal["rloo"] = "rloo"


class ReinforceAdvantage(Section):
    """Discounted returns, whitened over all policy tokens of the rollout batch (REINFORCE++, arXiv 2501.03262); no KL term."""

    type: Literal["reinforce++"] = "reinforce++"
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per policy token; tool tokens do not discount."""
    baseline: Literal["none", "group"] = "none"
    """`group`: the mean of the group is taken off each reward first, the paper's REINFORCE++-baseline."""


class TempoAdvantage(Section):
    """The group advantage plus, where a group's responses part, the change of the mean reward below (TEMPO, arXiv 2509.18314)."""

    type: Literal["tempo"] = "tempo"
    normalize_std: bool = True
    """Divide by the (unbiased) standard deviation of the group plus 1e-6."""


class GaeAdvantage(Section):
    """GAE of a value function that is learned beside the policy (PPO, arXiv 1506.02438 and 1707.06347); docs/critic.md."""

    type: Literal["gae"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per policy token; tool tokens do not discount."""
    lam: float = Field(1.0, ge=0, le=1)
    """GAE's lambda. 1: the reward minus the value; below, later values stand for a part of the reward."""
    whiten: bool = True
    """Give the advantages of the rollout batch's policy tokens mean 0 and variance 1."""
    critic: CriticConfig = CriticConfig()


Advantage = Annotated[
    GroupAdvantage | RlooAdvantage | ReinforceAdvantage | TempoAdvantage | GaeAdvantage,
    Field(discriminator="type"),
]


class OverlongShaping(Section):
    """A penalty that grows linearly over the last tokens of the response budget (DAPO, arXiv 2503.14476, section 3.4)."""

    max_tokens: PositiveInt
    """Response length, tool output included, with the full penalty; usually rollout.max_response_tokens."""
    buffer: PositiveInt
    """The penalty begins this many tokens before max_tokens. DAPO: 4096 of 20480."""
    penalty: NonNegativeFloat = 1.0
    """The full penalty, taken off the reward."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> OverlongShaping:
        if self.buffer > self.max_tokens:
            raise ValueError(f"buffer={self.buffer} is longer than max_tokens={self.max_tokens}; allowed: 1 to max_tokens")
        return self


class LengthShaping(Section):
    """In the groups answered best, shorter correct answers get more (GRPO-lambda, arXiv 2505.18086); all other rewards 0 or 1."""

    fraction: float = Field(0.2, gt=0, le=1)
    """Share of the rollout batch's groups, those with the most correct answers, in which length counts; at least one group."""
    alpha: float = Field(0.6, ge=0, le=1)
    """How much length weighs: correct answers get from 1 (short) down to 1 - alpha (long)."""
    correct_from: float = 1.0
    """A reward of at least this is a correct answer."""


class ShapingConfig(Section):
    """What rewards go through before they become advantages. Recorded rewards stay as they were judged."""

    overlong: OverlongShaping | None = None
    """Penalty on responses near the end of their budget, on top of `length`. null: none."""
    length: LengthShaping | None = None
    """Length-dependent reward of correct answers. null: rewards as they were judged."""
