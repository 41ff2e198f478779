"""The things that most deserve a look."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ctpo_megatron.report.findings import learning, operation, positions
from ctpo_megatron.report.findings.finding import Finding
from ctpo_megatron.report.reading.run import Run

SHOWN = 3
RULES: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    operation.end,
    operation.alarms,
    operation.losses,
    operation.skipped,
    operation.time,
    operation.bias,
    operation.unproven,
    operation.damage,
    learning.reward,
    learning.accuracy,
    learning.entropy,
    learning.groups,
    learning.answers,
    learning.lengths,
    positions.clipping,
    positions.growth,
    positions.drift,
    positions.sample_size,
    positions.jump,
)


def findings(run: Run) -> list[Finding]:
    """Returns all that the rules find in a run, what most deserves a look first."""
    found = [finding for rule in RULES for finding in rule(run)]
    return sorted(found, key=lambda each: -each.weight)
