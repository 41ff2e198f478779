"""What a run measures of itself and writes down: drift and its alarms, logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from ctpo_megatron.config.base import Section
from ctpo_megatron.config.sinks import AnySink

# Means of |log-prob difference| over a step's tokens that rounding does not explain: docs/gpu.md says what they were taken from.
_MEAN = {"float32": 1e-3, "bfloat16": 0.05}
_MEAN_MIXTURE = {"float32": 1e-3, "bfloat16": 0.15}
_MEAN_QUANTISED = 0.5  # where servers keep weights in fp8: docs/precision.md says what it was taken from
FEWEST_TOKENS = 1000  # below which a mean says little


@dataclass(frozen=True, slots=True)
class DriftBounds:
    """What ends a run when trainer and engine disagree; None: nothing does."""

    max: float | None = None  # of any token's |log-prob difference|
    mean: float | None = None  # of the mean over the tokens of a step that the present version sampled
    tokens: int = 1  # fewest of them that the mean is judged by


class DriftConfig(Section):
    """Agreement of trainer and engine about the log-probs of sampled tokens, measured at every step."""

    max: PositiveFloat | None = None
    """Largest allowed absolute difference of any token's log-prob. null: only measured."""
    mean: PositiveFloat | Literal["auto"] | None = "auto"
    """Largest allowed mean absolute difference. auto: 0.001 for float32; for bfloat16 0.05, or 0.15 for mixtures of experts; in
    steps of at least 1,000 tokens that the present version sampled. With weights.quantization 0.5. null: only measured."""

    def bounds(self, dtype: str, *, mixture: bool, quantised: bool = False) -> DriftBounds:
        """The bounds for weights in `dtype`, float32 or bfloat16; `mixture`: of a model with experts.

        `quantised`: servers keep them in fp8.
        """
        if self.mean != "auto":
            return DriftBounds(self.max, self.mean)
        if quantised:
            return DriftBounds(self.max, _MEAN_QUANTISED, FEWEST_TOKENS)
        return DriftBounds(self.max, (_MEAN_MIXTURE if mixture else _MEAN)[dtype], FEWEST_TOKENS)


class LogConfig(Section):
    """What is written down while a run goes on."""

    tensorboard: bool = True
    """Write RUN_DIR/tb."""
    rollouts_per_step: NonNegativeInt = 2
    """Trajectories shown as text in TensorBoard at each step."""
    save_rollouts: bool = True
    """Write every trajectory to RUN_DIR/rollouts."""
    save_tokens: bool = True
    """With them what training made of each token that the policy wrote, in RUN_DIR/tokens: drift, log-ratio, clipped or not."""
    every: PositiveInt = 1
    """Steps between plain lines in the log."""
    ratios_every: NonNegativeInt = 10
    """Steps between records of how log-ratios are distributed by position, in RUN_DIR/ratios.jsonl: about 10 kB each, for
    `ctpo report --paper`. 0: none."""
    sinks: tuple[AnySink, ...] = ()
    """Where numbers and events go besides, one of each type at most; see docs/sinks.md."""

    def counts_ratios(self, step: int) -> bool:
        """Returns whether training step `step`, from 1, is one of those whose log-ratios are counted and written down."""
        return self.ratios_every > 0 and step % self.ratios_every == 0

    @field_validator("sinks")
    @classmethod
    def _one_of_each_type(cls, sinks: tuple[AnySink, ...]) -> tuple[AnySink, ...]:
        types = [each.type for each in sinks]
        if len(set(types)) < len(types):
            raise ValueError(f"one of each type at most; found: {', '.join(types)}")
        return sinks
