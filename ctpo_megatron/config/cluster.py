"""Ray and devices: where things run."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat

from ctpo_megatron.config.base import Section


class ClusterConfig(Section):
    """Ray and devices."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch sees a GPU, else cpu."""
    address: str | None = None
    """Ray cluster to join: `auto` for the one on this host, or HOST:PORT. null: start one here and end it afterwards."""
    start_timeout_s: PositiveFloat = 1800.0
    """How long all actors together may take to come up, servers included."""
    call_timeout_s: PositiveFloat = 7200.0
    """How long one call to the trainer (a training step, a checkpoint) may take before the run is given up."""
    restarts: NonNegativeInt = 3
    """How often a part that the run cannot do without is started again when it was lost, with no training step done since the
    last time. Ranks of the trainer come back from the newest checkpoint, without touching the servers; where Ray itself was lost,
    the command begins anew and goes on. 0: the loss ends the run."""
    stop_grace_s: PositiveFloat = 25.0
    """How long after SIGTERM the run may take to save what it has. SLURM kills 30 s after it, by default."""
