"""Ray and devices: where things run."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat

from ctpo_megatron.config.base import Section


class WatchConfig(Section):
    """When a process of the run counts as hung. docs/operations/watch.md has what happens then."""

    floor_s: PositiveFloat = 60.0
    """A stage of a process may be silent for three times its usual longest silence and ten seconds, and at least for this and ten
    seconds."""
    first_s: PositiveFloat = 600.0
    """The same for a stage of which none has ended yet, such as the first training step, and for a process that just started."""
    stopped_s: PositiveFloat = 4.0
    """How long a process may be stopped (SIGSTOP), whatever it was doing."""
    frozen_s: PositiveFloat = 120.0
    """How long the driver's event loop may come to nothing. The command then ends with exit code 70."""


class ClusterConfig(Section):
    """Ray and devices."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch sees a GPU, else cpu."""
    address: str | None = None
    """Ray cluster to join: `auto` for the one on this host, or HOST:PORT. null: start one here and end it afterwards."""
    start_timeout_s: PositiveFloat = 1800.0
    """How long all actors together may take to come up, servers included. They are watched meanwhile: one that is stopped or does
    not answer is found by cluster.watch."""
    call_timeout_s: PositiveFloat = 7200.0
    """How long one call to the trainer (a training step, a checkpoint) may take before the run is given up though all ranks make
    progress. One that makes none is found by cluster.watch, within minutes."""
    watch: WatchConfig = WatchConfig()
    """The watch over all processes."""
    restarts: NonNegativeInt = 3
    """How often a part that the run cannot do without is started again when it was lost, with no training step done since the
    last time. Ranks of the trainer come back from the newest checkpoint, without touching the servers; where Ray itself was lost,
    the command begins anew and goes on. 0: the loss ends the run."""
    stop_grace_s: PositiveFloat = 25.0
    """How long after SIGTERM the run may take to save what it has. SLURM kills 30 s after it, by default."""
