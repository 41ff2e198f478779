"""Events of copies of the trainer's state in the memory of other processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event


@dataclass(frozen=True, slots=True)
class CopyKept(Event):
    """Keepers hold a whole copy of the trainer's state after training step `step`; the one before is gone."""

    name: ClassVar[str] = "copy kept"
    console: ClassVar[bool] = False  # one after every step
    step: int
    seconds: float  # since the end of the step
    stood: float  # of these, until the trainer could do something else
    bytes: int

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"the state after step {self.step} is kept in memory after {self.seconds:.1f} s ({self.bytes:,} bytes)"


@dataclass(frozen=True, slots=True)
class CopyGone(Event):
    """The copy after training step `step` did not come about, or cannot be used any more. `left`: the step of another one."""

    name: ClassVar[str] = "copy lost"
    step: int
    reason: str
    left: int | None

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        left = "there is none in memory now" if self.left is None else f"that of step {self.left} is there"
        return f"the copy of step {self.step} in memory is lost, {left}: {' '.join(self.reason.split())}"


@dataclass(frozen=True, slots=True)
class CopyLeftOut(Event):
    """No copy was made after training step `step`: the one before was still being handed over."""

    name: ClassVar[str] = "copy left out"
    console: ClassVar[bool] = False
    step: int
    before: int

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"no copy of step {self.step} in memory: that of step {self.before} is still being handed over"
