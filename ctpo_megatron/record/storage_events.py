"""Events of a storage that is at fault: it is full, read-only, stale, or the run's directory is away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event


@dataclass(frozen=True, slots=True)
class StorageFault(Event):
    """The storage does not take what the run writes. It is written down when the fault is mended, with the time of the fault."""

    name: ClassVar[str] = "storage fault"
    reason: str
    wait_s: float  # for which the run waits

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        words = " ".join(self.reason.split())
        return f"storage fault: {words} The run keeps what it has, and waits up to {self.wait_s:.0f} s for this to be mended"


@dataclass(frozen=True, slots=True)
class StorageMended(Event):
    """The storage takes everything again, and nothing is held back any more."""

    name: ClassVar[str] = "storage mended"
    seconds: float  # since the fault was noticed
    writes: int  # that were held back meanwhile, and are done

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"the storage is mended after {self.seconds:.0f} s; {self.writes} writes that were held back are done"


@dataclass(frozen=True, slots=True)
class StorageGivenUp(Event):
    """The run ends, and what was held back is lost."""

    name: ClassVar[str] = "storage given up"
    reason: str
    writes: int

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"{self.writes} writes that were held back are lost: {' '.join(self.reason.split())}"


@dataclass(frozen=True, slots=True)
class CheckpointDelayed(Event):
    """The storage did not take a checkpoint that was written beside training. One of the state by then takes its place."""

    name: ClassVar[str] = "checkpoint delayed"
    step: int
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"the checkpoint of step {self.step} is made up for before the next step: {' '.join(self.reason.split())}"


@dataclass(frozen=True, slots=True)
class OldCheckpointsStay(Event):
    """Checkpoints that were to go could not be removed; it is tried again after the next one."""

    name: ClassVar[str] = "old checkpoints stay"
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"old checkpoints stay until the next one: {self.reason}"
