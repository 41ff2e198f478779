"""What is optimised: the objective, its aggregation, and how rewards become advantages."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, model_validator

from ctpo_megatron.config.advantages import Advantage, GaeAdvantage, GroupAdvantage, ShapingConfig
from ctpo_megatron.config.base import FilePath, Section
from ctpo_megatron.config.correction_alarm import CorrectionAlarm
from ctpo_megatron.config.critic import CriticConfig
from ctpo_megatron.config.distillation import DistillationConfig
from ctpo_megatron.config.objectives import Aggregation, Correction, CtpoObjective, DelightConfig, Objective, SequenceMean

TOP_K = 20  # of the top-k divergences, as DPPO's and CPPO's papers have it, and of CTPO's top-k bands


class ReferenceConfig(Section):
    """A penalty on the distance from a reference policy; docs/objectives.md has the estimators and their gradients."""

    coeff: NonNegativeFloat = 1e-3
    """Weight of the penalty in the loss."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimator of the KL divergence at each token."""
    path: FilePath | None = None
    """Directory of the reference policy, a model of the same shape as the trained one. null: model.path."""


class AlgorithmConfig(Section):
    """The policy-gradient step."""

    objective: Objective = CtpoObjective()
    """Which surrogate loss; `type` picks it."""
    aggregation: Aggregation = SequenceMean()
    """How per-token losses become one number. CTPO's paper uses sequence-mean. `aggregation: token-mean` is short for
    `aggregation: {type: token-mean}`."""
    advantage: Advantage = GroupAdvantage()
    """How rewards become advantages; `type` picks it."""
    shaping: ShapingConfig = ShapingConfig()
    """What rewards go through before that."""
    anchor: Literal["version", "old", "rollout"] = "version"
    """What a token's ratio is taken against. `version`: the policy version that sampled it, so the trainer's own log-prob where
    that is the present version, the engine's for tokens of older versions. `old`: the trainer's log-prob before the first
    optimizer step on the batch, whatever sampled the token. `rollout`: the engine's, as dppo, cppo, trm, drpo and kpop
    always do."""
    restart_at_version: bool = False
    """Begin prefix statistics and positions anew where a newer policy version went on writing a trajectory."""
    reference: ReferenceConfig | None = None
    """Keep the policy near a reference policy, whose weights wait in each rank's host memory. null: do not."""
    distillation: DistillationConfig | None = None
    """Follow one or several teachers beside the rewards, or in their place. null: do not."""
    correction: Correction | None = None
    """Importance weights for the distance between the anchor and the engine's log-probs; `type` picks the kind. null: none."""
    delight: DelightConfig | None = None
    """Weigh tokens by what is surprising about them and whether it was good. null: do not."""
    correction_alarm: CorrectionAlarm = CorrectionAlarm()
    """When these weights count as shrunk, which is an event."""

    @property
    def top_k(self) -> int:
        """How many of the sampling policy's top-k tokens the objective compares at each position; 0: none."""
        return TOP_K if self.objective.compares_top_k else 0

    @property
    def gae(self) -> GaeAdvantage | None:
        """How a critic's values become advantages; None where no critic learns."""
        return self.advantage if isinstance(self.advantage, GaeAdvantage) else None

    @property
    def critic(self) -> CriticConfig | None:
        """The value function that is learned; None where there is none."""
        return None if self.gae is None else self.gae.critic

    @model_validator(mode="after")
    def _weights_need_no_values(self) -> AlgorithmConfig:
        if self.gae is not None and self.aggregation.type == "balanced":
            raise ValueError(
                "algorithm.aggregation 'balanced' weighs sequences by the signs of their advantages, which algorithm.advantage "
                "'gae' finds only in the trainer; use sequence-mean, token-mean, sequence-sum or constant"
            )
        return self

    @model_validator(mode="after")
    def _ratio_is_counted_once(self) -> AlgorithmConfig:
        if self.correction is not None and "rollout" in (self.objective.anchor, self.anchor):
            raise ValueError(
                f"algorithm.correction with objective {self.objective.type!r} and anchor {self.anchor!r}: the ratio is taken "
                "against the rollout policy already, a correction would count the distance twice. Leave out the correction"
            )
        return self
