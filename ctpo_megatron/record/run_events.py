"""Events of a run that stops, goes on, and gets up again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event


@dataclass(frozen=True, slots=True)
class JournalCut(Event):
    """The end of a journal file was not as it was written: its process, or the host, ended in the middle of it."""

    name: ClassVar[str] = "journal cut"
    file: str
    bytes: int

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"{self.file}: the last {self.bytes:,} bytes are half a record and were dropped"


@dataclass(frozen=True, slots=True)
class JournalRead(Event):
    """Attempts that earlier processes made are at hand."""

    name: ClassVar[str] = "journal read"
    whole: int
    begun: int

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"the journal holds {self.whole:,} finished attempts and {self.begun:,} that were interrupted"


@dataclass(frozen=True, slots=True)
class StopRequested(Event):
    """The run was asked to stop in order: it leaves off, saves all it has and ends."""

    name: ClassVar[str] = "stop requested"
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"stopping in order: {self.reason}"


@dataclass(frozen=True, slots=True)
class JobEnds(Event):
    """SLURM says when the job ends; again when that has moved. `at`: seconds since 1970; None: there is no limit."""

    name: ClassVar[str] = "job ends"
    at: float | None
    left_s: float | None

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        if self.at is None or self.left_s is None:
            return "SLURM sets the job no time limit"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.at))
        return f"SLURM ends the job at {when}, in {self.left_s / 60:,.0f} min; the run stops in order before that"


@dataclass(frozen=True, slots=True)
class JobEndUnknown(Event):
    """SLURM does not say when the job ends. It is asked again, and the event comes once until it answers."""

    name: ClassVar[str] = "job end unknown"
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"when the job ends is not known now, what SLURM said last counts: {self.reason}"


@dataclass(frozen=True, slots=True)
class RunStopped(Event):
    """The run has ended in order before it was done. `step`: training steps whose result is kept."""

    name: ClassVar[str] = "stopped"
    console: ClassVar[bool] = False  # the command says it, with what to do next
    reason: str
    step: int

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"stopped after step {self.step}: {self.reason}"


@dataclass(frozen=True, slots=True)
class PartLost(Event):
    """A process died or hangs that the work under way cannot do without; what becomes of the run follows."""

    name: ClassVar[str] = "part lost"
    console: ClassVar[bool] = False  # what follows says why
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"lost: {self.reason}"


@dataclass(frozen=True, slots=True)
class TrainerRestarting(Event):
    """Ranks of the trainer were lost; all are started again. `step`: where training goes on. `restart` counts from 1."""

    name: ClassVar[str] = "trainer restarting"
    reason: str
    restart: int
    of: int
    wait_s: float

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        wait = f" in {self.wait_s:.0f} s" if self.wait_s else ""
        return f"the trainer starts again{wait}, {self.restart} of {self.of} without a step between: {self.reason}"


@dataclass(frozen=True, slots=True)
class TrainerRestarted(Event):
    """The trainer is back, with the state after `step` training steps, and the servers hold its weights."""

    name: ClassVar[str] = "trainer restarted"
    step: int
    seconds: float  # since the loss was known

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"the trainer is back at step {self.step} after {self.seconds:.1f} s"
