"""The objectives and what goes with them: aggregation, correction of the mismatch between trainer and engine."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, model_validator

from ctpo_megatron.config.base import Section

Divergence = Literal["binary_tv", "binary_kl", "topk_tv", "topk_kl"]
AnyDivergence = Literal["k2", "k3", "binary_tv", "binary_kl", "topk_tv", "topk_kl"]
Band = Literal["position", "variance", "entropy", "topk_variance", "topk_entropy"]


class BaseObjective(Section):
    """What all objectives share."""

    anchor: ClassVar[Literal["old", "rollout"]] = "old"
    """The policy that ratios are taken against: the trainer's before the first step, or the engine's that sampled."""

    @property
    def compares_top_k(self) -> bool:
        """Whether it looks at the sampling policy's likeliest tokens."""
        return any(str(getattr(self, name, "")).startswith("topk_") for name in ("divergence", "band"))

    @property
    def acts_without_advantage(self) -> bool:
        """Whether it has a gradient at tokens whose advantage is zero."""
        return False


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
    band: Band = "position"
    """What takes the place of the position in the bounds. `position`: nothing (the paper). `variance`, `entropy`: the sum up
    to the token of squared log-ratios, or of the sampled tokens' surprisal, in units of `band_unit`. `topk_*`: of expectations
    over the sampling policy's top-k tokens, whose log-probs it needs."""
    band_unit: PositiveFloat | None = None
    """Variance (nats squared) or entropy (nats) that counts as one position. null: its mean over the trajectory. The bounds
    then end where the paper's do, and only their growth on the way is measured."""

    @model_validator(mode="after")
    def _a_measured_band_grows(self) -> CtpoObjective:
        if self.band == "position" and self.band_unit is not None:
            raise ValueError(
                f"band_unit={self.band_unit:g} with band 'position': positions are counted, not measured. Leave out band_unit, "
                "or set band to variance, entropy, topk_variance or topk_entropy"
            )
        if self.band != "position" and self.power <= 0:
            raise ValueError(
                f"band {self.band!r} with power={self.power:g}: bounds that do not grow do not look at what is measured. Set "
                "power above 0, or band to 'position'"
            )
        return self


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


_CALIBRATION = ("adaptive_max", "adaptive_quantile", "adaptive_factor")


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
    """Take a quantile of a sequence's divergences, held to [budget, adaptive_max * budget], as its budget (for base models)."""
    adaptive_max: float = Field(2.0, ge=1)
    """Largest such budget, in units of `budget`. 2 is the factor of the paper's text, 5 that of its authors' code."""
    adaptive_quantile: float = Field(0.9, ge=0, le=1)
    """Which quantile. 0.9 in both."""
    adaptive_factor: PositiveFloat = 1.0
    """What the quantile is multiplied by before it is held. 1 in both."""

    @model_validator(mode="after")
    def _calibration_is_used(self) -> CppoObjective:
        changed = [name for name in _CALIBRATION if getattr(self, name) != type(self).model_fields[name].default]
        if changed and not self.adaptive_budget:
            raise ValueError(
                f"{', '.join(changed)} without adaptive_budget: the budget is fixed. Set adaptive_budget=true as well"
            )
        return self


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


class DrpoObjective(BaseObjective):
    """DRPO, arXiv 2606.09821: a quadratic penalty on how far a token's probability has moved, smooth where DPPO masks."""

    anchor = "rollout"
    type: Literal["drpo"] = "drpo"
    epsilon: PositiveFloat = 12.5
    """Movement of a token's probability at which its gradient is 0, and beyond which it turns round. The paper's value; as
    probabilities move by less than 1, it takes away at most a twelfth of a gradient."""


class KpopObjective(BaseObjective):
    """KPop (Ring's successor of IcePop): drops tokens whose probability has moved too far in KL, in either direction."""

    anchor = "rollout"
    type: Literal["kpop"] = "kpop"
    delta: PositiveFloat = 0.05
    """Largest KL divergence of two outcomes, the sampled token or another, either way round. No default of its own is known; this
    is DPPO's for KL."""
    gate: Literal["token", "prefix_max", "prefix_sum"] = "token"
    """What is held to delta: a token's own divergence; the largest up to the token; their sum up to the token."""
    penalty: NonNegativeFloat = 0.0
    """Weight of the squared log-ratio that is added to every token's loss, dropped ones included."""

    @property
    def acts_without_advantage(self) -> bool:
        return self.penalty > 0


class ReinforceObjective(BaseObjective):
    """The policy gradient without an importance ratio: the baseline of all that have one."""

    type: Literal["reinforce"] = "reinforce"


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
    | TrmObjective
    | DrpoObjective
    | KpopObjective
    | ReinforceObjective,
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


class DelightConfig(Section):
    """Delightful Policy Gradient, arXiv 2603.14608: a weight on any objective, sigmoid(advantage * surprisal / eta)."""

    eta: PositiveFloat = 1.0
    """Temperature. The paper: 1."""
    max_surprisal: PositiveFloat | None = None
    """Largest surprisal (minus the log-prob) that counts, in nats. null: any."""
    centred: bool = False
    """Double the weight, so that it is 1 and not a half where advantage or surprisal is 0."""
