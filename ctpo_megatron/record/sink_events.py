"""What happens to the places where a run's numbers go besides its own files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event


@dataclass(frozen=True, slots=True)
class PointsLost(Event):
    """TensorBoard or a sink did not take all that it was given: it is slow, or at fault. The run went on, and metrics.jsonl has
    all."""

    name: ClassVar[str] = "points lost"
    sink: str
    pieces: int  # since the last such event: a piece is all scalars of a step, a histogram, a text, an image or a span
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"{self.sink} lost {self.pieces} pieces of the record, which metrics.jsonl has: {self.reason}"
