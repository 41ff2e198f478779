"""What a run measures of itself and writes down: drift and its alarms, logs."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from ctpo_megatron.config.base import Section


class DriftConfig(Section):
    """Agreement of trainer and engine about the log-probs of sampled tokens, measured at every step."""

    max: PositiveFloat | None = None
    """Largest allowed absolute difference of any token's log-prob. null: only measured."""
    mean: PositiveFloat | None = None
    """Largest allowed mean absolute difference. null: only measured."""


class LogConfig(Section):
    """What is written down while a run goes on."""

    tensorboard: bool = True
    """Write RUN_DIR/tb."""
    rollouts_per_step: NonNegativeInt = 2
    """Trajectories shown as text in TensorBoard at each step."""
    save_rollouts: bool = True
    """Write every trajectory to RUN_DIR/rollouts."""
    every: PositiveInt = 1
    """Steps between plain lines in the log."""
