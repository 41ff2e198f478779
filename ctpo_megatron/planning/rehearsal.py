"""A rehearsed step (`ctpo plan --rehearse`) beside the plan: which part is larger than was computed, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ctpo_megatron.planning.memory import StageMemory
from ctpo_megatron.planning.run import PlannedRun

# What a rehearsal tells apart, and the parts of the plan that each stands for. The plan's other parts are not rehearsed.
PARTS: Mapping[str, tuple[str, ...]] = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "batch": ("replay", "micro_batches"),
    "step": ("activations", "working", "head"),
}
NEAR = 0.1  # a larger difference, as a share of what was planned, wants an explanation
FEW = 2**28  # bytes; a smaller difference does not, whatever its share


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one part of a rank's memory."""

    name: str
    planned: int
    rehearsed: int

    @property
    def difference(self) -> int:
        """Bytes that the rehearsal found more than the plan."""
        return self.rehearsed - self.planned

    @property
    def is_near(self) -> bool:
        """Whether both agree within `NEAR`, or differ by less than `FEW`."""
        return abs(self.difference) <= max(NEAR * self.planned, FEW)


def compare(planned: StageMemory, rehearsed: Mapping[str, int]) -> list[Part]:
    """Part by part, and "together" as the last one. `rehearsed`: bytes of every part in PARTS."""
    parts = [Part(name, sum(getattr(planned, each) for each in names), rehearsed[name]) for name, names in PARTS.items()]
    return [*parts, Part("together", sum(part.planned for part in parts), sum(part.rehearsed for part in parts))]


def not_rehearsed(planned: StageMemory) -> dict[str, int]:
    """Bytes of the plan's parts that no rehearsal shows, where there are any."""
    shown = {name for names in PARTS.values() for name in names}
    sizes = {field.name: getattr(planned, field.name) for field in fields(planned) if field.name not in shown}
    return {name: size for name, size in sizes.items() if size}


def rehearsed_micro_batches(run: PlannedRun, planned: int) -> int:
    """So many micro-batches that every stage holds as many at once as in a whole step of `planned` ones; two without stages."""
    pp, vpp = run.parallel.pp, run.parallel.vpp
    if vpp > 1:  # megatron's interleaving takes multiples of pp
        return pp * min(2, -(-planned // pp))
    return min(planned, max(pp, 2))


def rehearsed_tokens(run: PlannedRun) -> int:
    """Tokens of a micro-batch on one rank: as many as are allowed and as context and sequence parallelism can share out."""
    tokens = run.train.max_tokens_per_micro_batch
    return tokens - tokens % (2 * run.parallel.tp)
