"""Traces of single steps."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from ctpo_megatron.config.base import Section


class TraceConfig(Section):
    """Training steps of which everything is written down: what each process did, and when."""

    steps: tuple[PositiveInt, ...] = ()
    """Training steps, counted from 1, of each of which RUN_DIR/traces/step_XXXXXXXX.json.gz is written, for Perfetto."""
    profiler: tuple[NonNegativeInt, ...] = ()
    """Trainer ranks that record these steps with torch's profiler too, each to a file of its own. Those steps take longer."""
    memory: tuple[NonNegativeInt, ...] = ()
    """Trainer ranks that record these steps' allocations on their GPU, as torch's memory snapshots. CPUs have none."""

    def check(self, ranks: int, device: str) -> None:
        """Raises ValueError where ranks are named that a trainer of `ranks` has not, or that have no GPU, or for no step."""
        for key, named in (("profiler", self.profiler), ("memory", self.memory)):
            if named and not self.steps:
                raise ValueError(f"trace.{key}={list(named)} names ranks, but trace.steps names no step; give one, or no ranks")
            if missing := [rank for rank in named if rank >= ranks]:
                raise ValueError(f"trace.{key} names rank {missing[0]}; the trainer has ranks 0 to {ranks - 1}")
        if self.memory and device == "cpu":
            raise ValueError(
                f"trace.memory={list(self.memory)} records what is allocated on GPUs, and cluster.device is cpu; leave it out"
            )
