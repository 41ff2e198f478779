"""The host's memory that the trainer's ranks of one node need, in bytes.

What an offloaded optimizer holds there is read off megatron-core 0.16.1 (optimizer/cpu_offloading/hybrid_optimizer.py): of
each number that is offloaded a float32 copy, two moments, and a gradient on its way to them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ctpo_megatron.planning.memory import GIB, PINNED, Stage
from ctpo_megatron.planning.run import PlannedRun


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Of one rank, at its fullest moment: a save. Other processes of its node are not counted."""

    optimizer: int  # what is offloaded
    copies: int  # weights of a reference policy and of copied teachers
    saving: int  # what a save takes besides
    kept: int  # parts of copies of the trainer's state, where they are kept in memory

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def is_notable(self) -> bool:
        """Whether there is more than saves."""
        return self.total > self.saving


def plan_host(run: PlannedRun, stages: list[Stage]) -> HostMemory:
    """Returns what a rank of the stage needs that needs most."""
    return max((_of(run, stage) for stage in stages), key=lambda host: host.total)


def host_problem(run: PlannedRun, host: HostMemory, host_gib: float | None, ranks: int) -> str | None:
    """Why `ranks` ranks do not fit on a node whose host has `host_gib`; None where they do, or it is not known."""
    needed = ranks * host.total / GIB
    if host_gib is None or needed <= host_gib:
        return None
    parts = {"the offloaded optimizer": host.optimizer, "weights of reference policy and copied teachers": host.copies}
    parts |= {"a save at its fullest": host.saving, "copies of the trainer's state": host.kept}
    told = ", ".join(f"{size / GIB:.1f} {name}" for name, size in parts.items() if size)
    helps = ["fewer ranks on a node (--gpus-per-node)", "a model in more parts (parallel.pp, ep)"]
    helps += ["a larger parallel.dp", f"optimizer.cpu_offload below {run.optimizer.cpu_offload:g}"] if host.optimizer else []
    helps += ["checkpoint.memory.every=0"] if host.kept else []
    return (
        f"the {ranks} ranks of a node need {needed:.1f} GiB of their host's memory, {needed - host_gib:.1f} GiB more than "
        f"--host-gb {host_gib:g}. Of each rank, GiB: {told}. What helps: {', '.join(helps)}."
    )


def _of(run: PlannedRun, stage: Stage) -> HostMemory:
    saving = stage.saving
    return HostMemory(
        optimizer=stage.host_optimizer,
        copies=PINNED * run.host_copies * stage.memory.weights,
        saving=max(saving.gathering, 2 * saving.writing if run.keeps_copies else 0),  # handed over: as much again
        kept=saving.kept if run.keeps_copies else 0,
    )
