"""Events of traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event


@dataclass(frozen=True, slots=True)
class TraceWritten(Event):
    """A step's trace is there. `error_us`: the largest error of any process's clock against the driver's."""

    name: ClassVar[str] = "trace written"
    step: int
    file: str
    processes: int
    spans: int
    left_out: int  # spans that were too many
    error_us: float
    seconds: float  # that gathering and writing took, behind the step

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        left = f", {self.left_out:,} more were left out" if self.left_out else ""
        return (
            f"trace of step {self.step}: {self.spans:,} spans of {self.processes} processes{left}, clocks within "
            f"{self.error_us:.0f} us, {self.seconds:.1f} s; {self.file}"
        )


@dataclass(frozen=True, slots=True)
class TraceLost(Event):
    """A step's trace, or a part of it, could not be made; the run goes on."""

    name: ClassVar[str] = "trace lost"
    step: int
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"no trace of step {self.step}: {self.reason}"
