"""Events of the watch over a run's processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event


@dataclass(frozen=True, slots=True)
class StallFound(Event):
    """A process is stopped, or silent past its deadline. `acts`: the run ends it, and starts it again where it can.

    `seconds`: how long the run has stood still because of it; 0 where it is none of the trainer's ranks, as others go on.
    """

    name: ClassVar[str] = "stall"
    kind: str  # stopped, deadlock, collective, hung or slow
    culprits: tuple[str, ...]
    verdict: str
    report: str  # its file
    acts: bool
    seconds: float

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"stall: {self.verdict}. Report: {self.report}"
