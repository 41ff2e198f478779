"""The objectives and what goes with them: aggregation, correction of the mismatch between trainer and engine."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat

from ctpo_megatron.config.base import Section

Divergence = Literal["binary_tv", "binary_kl", "topk_tv", "topk_kl"]
AnyDivergence = Literal["k2", "k3", "binary_tv", "binary_kl", "topk_tv", "topk_kl"]


class BaseObjective(Section):
    """What all objectives share."""

    anchor: ClassVar[Literal["old", "rollout"]] = "old"
    """The policy that ratios are taken against: the trainer's before the first step, or the engine's that sampled."""


class CtpoObjective(BaseObjective):
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


class GrpoObjective(BaseObjective):
    """Token-level ratios with PPO clipping (arXiv 2402.03300; clip-higher of DAPO; dual clip of arXiv 1912.09729)."""

    type: Literal["grpo"] = "grpo"
    clip_low: NonNegativeFloat = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: NonNegativeFloat = 0.2
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: PositiveFloat | None = 3.0
    """Bound of the ratio where the advantage is negative. null: none."""


class GspoObjective(BaseObjective):
    """Group Sequence Policy Optimization, arXiv 2507.18071: the geometric mean of a sequence's ratios, clipped as one."""

    type: Literal["gspo"] = "gspo"
    clip_low: NonNegativeFloat = 3e-4
    """Sequence ratios below 1 - clip_low are clipped."""
    clip_high: NonNegativeFloat = 4e-4
    """Sequence ratios above 1 + clip_high are clipped."""


class SequenceObjective(BaseObjective):
    """Full-sequence importance sampling with PPO clipping: the product of all ratios of a sequence."""

    type: Literal["sequence"] = "sequence"
    clip_low: NonNegativeFloat = 0.2
    """Sequence ratios below 1 - clip_low are clipped."""
    clip_high: NonNegativeFloat = 0.2
    """Sequence ratios above 1 + clip_high are clipped."""


class SapoObjective(BaseObjective):
    """Soft Adaptive Policy Optimization, arXiv 2511.20347: a sigmoid of the token ratio in place of a clip."""

    type: Literal["sapo"] = "sapo"
    tau_positive: PositiveFloat = 1.0
    """Steepness where the advantage is positive."""
    tau_negative: PositiveFloat = 1.05
    """Steepness elsewhere."""


class CispoObjective(BaseObjective):
    """CISPO, MiniMax-M1, arXiv 2506.13585: the clipped token ratio as a weight without gradient."""

    type: Literal["cispo"] = "cispo"
    clip_low: NonNegativeFloat = 1.0
    """Weights below 1 - clip_low are raised to it; 1: no lower bound."""
    clip_high: NonNegativeFloat = 0.2
    """Weights above 1 + clip_high are lowered to it. The paper does not disclose its value."""


class GmpoObjective(BaseObjective):
    """Geometric-Mean Policy Optimization, arXiv 2507.20673: the geometric mean of one-sidedly clipped token ratios."""

    type: Literal["gmpo"] = "gmpo"
    clip_low: NonNegativeFloat = 0.4
    """Token log-ratios below -clip_low are clipped where the advantage is negative."""
    clip_high: NonNegativeFloat = 0.4
    """Token log-ratios above clip_high are clipped where the advantage is positive."""


class MinproObjective(BaseObjective):
    """MinPRO, arXiv 2601.22718: the token ratio times the smallest ratio before it."""

    type: Literal["minpro"] = "minpro"
    clip_low: NonNegativeFloat = 0.2
    """Products below 1 - clip_low are clipped. The paper's value is not known."""
    clip_high: NonNegativeFloat = 0.28
    """Products above 1 + clip_high are clipped. The paper's value is not known."""
    form: Literal["weight", "ppo"] = "weight"
    """`weight`: the clipped product is a weight without gradient (the paper). `ppo`: PPO's surrogate of it."""


class DppoObjective(BaseObjective):
    """DPPO, arXiv 2602.04879: masks tokens whose divergence from the sampling policy is too large and grows further."""

    anchor = "rollout"
    type: Literal["dppo"] = "dppo"
    divergence: Divergence = "binary_tv"
    """What is bounded; topk_* needs the sampling policy's top-k log-probs."""
    delta: PositiveFloat = 0.15
    """Largest divergence. The paper: 0.15 to 0.2 for total variation, 0.05 for KL."""
    ratio_cap: PositiveFloat | None = 5.0
    """Largest weight of a token. null: none."""


class CppoObjective(BaseObjective):
    """CPPO, arXiv 2606.10968: a divergence bound per token and a budget for the whole prefix."""

    anchor = "rollout"
    type: Literal["cppo"] = "cppo"
    divergence: Divergence = "binary_tv"
    """What is bounded; topk_* needs the sampling policy's top-k log-probs."""
    delta: PositiveFloat = 0.15
    """Largest weighted divergence of a token. The paper: 0.15 dense, 0.2 for a 30B MoE; for KL 0.1."""
    budget: NonNegativeFloat = 0.015
    """Divergence that a prefix may use per token on average. The paper: 0.015; for KL 0.002."""
    weight_min: float = Field(0.8, ge=0, le=1)
    """Weight of the last token's divergence; the first token's is 1, linear in between."""
    adaptive_budget: bool = False
    """Take each sequence's 90th percentile of the divergence, held to [budget, 2 budget], as its budget (for base models)."""


class TrmObjective(BaseObjective):
    """TRM, arXiv 2512.23075: leaves out whole sequences that have moved too far from the sampling policy."""

    anchor = "rollout"
    type: Literal["trm"] = "trm"
    divergence: AnyDivergence = "k3"
    """Estimate of KL(rollout || current) per token. The paper sums over the whole vocabulary; k2 and k3 use the sampled token."""
    max_divergence: PositiveFloat | None = None
    """Largest divergence of any token. The paper: 0.05. null: not applied."""
    mean_divergence: PositiveFloat | None = 0.001
    """Largest mean over the sequence. The paper: 0.001. null: not applied."""


Objective = Annotated[
    CtpoObjective
    | GrpoObjective
    | GspoObjective
    | SequenceObjective
    | SapoObjective
    | CispoObjective
    | GmpoObjective
    | MinproObjective
    | DppoObjective
    | CppoObjective
    | TrmObjective,
    Field(discriminator="type"),
]


class TokenMean(Section):
    """Mean over all tokens of the policy."""

    type: Literal["token-mean"] = "token-mean"


class SequenceMean(Section):
    """Mean over sequences of the means over their tokens."""

    type: Literal["sequence-mean"] = "sequence-mean"


class SequenceSum(Section):
    """Mean over sequences of the sums over their tokens."""

    type: Literal["sequence-sum"] = "sequence-sum"


class Constant(Section):
    """Mean over sequences of the sums over their tokens divided by a fixed number of tokens (Dr. GRPO, arXiv 2503.20783)."""

    type: Literal["constant"] = "constant"
    tokens: PositiveFloat
    """The fixed number, usually the largest response length."""


class Balanced(Section):
    """Balanced Aggregation, arXiv 2605.04077: token means of a group's positive and negative sequences, by their numbers."""

    type: Literal["balanced"] = "balanced"


def _a_word_is_a_type(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


Aggregation = Annotated[
    TokenMean | SequenceMean | SequenceSum | Constant | Balanced,
    Field(discriminator="type"),
    BeforeValidator(_a_word_is_a_type),
]
"""A bare word is short for a section with this `type`."""

Level = Literal["token", "prefix", "sequence", "geometric"]


class TruncatedWeights(Section):
    """Truncated importance sampling: the weight old / rollout, held to a range."""

    type: Literal["truncate"] = "truncate"
    level: Level = "token"
    """token: its own ratio; prefix: product up to the token; sequence: product of all; geometric: its root."""
    low: NonNegativeFloat = 0.0
    """Smaller weights are raised to it."""
    high: PositiveFloat = 2.0
    """Larger weights are lowered to it."""


class MaskedWeights(Section):
    """Masked importance sampling: the weight old / rollout inside a range, 0 outside."""

    type: Literal["mask"] = "mask"
    level: Level = "token"
    """token: its own ratio; prefix: product up to the token; sequence: product of all; geometric: its root."""
    low: NonNegativeFloat = 0.5
    """Smaller weights become 0."""
    high: PositiveFloat = 2.0
    """Larger weights become 0."""


class IcepopWeights(Section):
    """IcePop, arXiv 2510.18855: token weights inside a range, 0 outside."""

    type: Literal["icepop"] = "icepop"
    low: NonNegativeFloat = 0.5
    """Smaller weights become 0."""
    high: PositiveFloat = 5.0
    """Larger weights become 0."""

    @property
    def level(self) -> Level:
        """IcePop looks at single tokens."""
        return "token"


Correction = Annotated[TruncatedWeights | MaskedWeights | IcepopWeights, Field(discriminator="type")]
