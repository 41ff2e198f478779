"""Where things run, how weights travel, and the alarms of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from ctpo_megatron.config.base import Section


class ClusterConfig(Section):
    """Ray and devices."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch sees a GPU, else cpu."""
    address: str | None = None
    """Ray cluster to join: `auto` for the one on this host, or HOST:PORT. null: start one here and end it afterwards."""
    start_timeout_s: PositiveFloat = 600.0
    """How long all actors together may take to come up."""
    call_timeout_s: PositiveFloat = 7200.0
    """How long one call to the trainer (a training step, a checkpoint) may take before the run is given up."""


class BroadcastTransport(Section):
    """Weights go into SGLang through its update group (NCCL, gloo on CPUs); no disk."""

    type: Literal["broadcast"] = "broadcast"
    bucket_mb: PositiveInt = 512
    """Weights gathered and sent at a time."""
    timeout_s: PositiveFloat = 600.0
    """How long one publication may take."""


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
