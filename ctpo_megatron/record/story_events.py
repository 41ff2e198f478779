"""Events about a run's incarnations: the processes that work on it one after another, and what became of their time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ctpo_megatron.record.events import Event

How = Literal["done", "stopped", "cancelled", "failed", "killed"]


@dataclass(frozen=True, slots=True)
class IncarnationBegan(Event):
    """A process begins to work on the run, after its input was checked."""

    name: ClassVar[str] = "incarnation began"
    number: int  # counted from 1 over the life of the run directory
    checkpoint: str | None  # that it goes on from; None: a new run
    step: int  # training steps that are done
    previous: How | None  # how the one before ended; None: there is none
    host: str
    pid: int
    process: float  # when the process began, seconds since 1970
    allocated: float  # when SLURM gave the job its nodes; where that is not known, when the process began
    job: str | None  # SLURM's id
    restarts: int | None  # how often SLURM has requeued the job
    version: str  # of this package
    commit: str | None  # of this package's git checkout
    command: tuple[str, ...]  # without secrets
    total: int | None = None  # training steps of the whole run, where train.steps does not say it

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        whence = "a new run" if self.checkpoint is None else f"from {self.checkpoint}, step {self.step}"
        job = "" if self.job is None else f", SLURM job {self.job}" + (f" (restart {self.restarts})" if self.restarts else "")
        before = "" if self.previous in (None, "done") else f"; the one before was {self.previous}"
        return f"incarnation {self.number}: {whence}, on {self.host}{job}{before}"


@dataclass(frozen=True, slots=True)
class IncarnationEnded(Event):
    """An incarnation is over.

    done: it came to the last step; stopped: in order, with all work saved; cancelled: by a signal, without a save; failed: by an
    error; killed: without a word, which the next one notices.
    """

    name: ClassVar[str] = "incarnation ended"
    console: ClassVar[bool] = False  # the command says it
    number: int
    how: How
    reason: str  # one line; empty for done
    at: float  # seconds since 1970; of a killed one its last sign of life

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"incarnation {self.number}: {self.how}" + (f", {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True)
class GoodputMeasured(Event):
    """How the time of all incarnations so far was spent; `record.goodput` says what each cause means."""

    name: ClassVar[str] = "goodput"
    goodput: float  # share of the allocated seconds that were useful
    useful: float
    allocated: float
    elapsed: float  # with the waiting between allocations
    incarnations: int
    seconds: dict[str, float]  # by cause; they add up to `elapsed`

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        largest = sorted(self.seconds.items(), key=lambda each: -each[1])
        words = ", ".join(f"{cause} {seconds:.0f} s" for cause, seconds in largest if seconds >= 1.0)
        return f"goodput {self.goodput:.1%} of {self.allocated:.0f} s in {self.incarnations} incarnations ({words})"


@dataclass(frozen=True, slots=True)
class BoardCut(Event):
    """TensorBoard's files were brought back to the step from which the run goes on."""

    name: ClassVar[str] = "board cut"
    first_step: int  # of those that are written anew
    points: int  # that were removed: of steps beyond the checkpoint
    unreadable: int  # bytes that were removed because nobody can read them
    kept: tuple[str, ...]  # files as they were before bytes in their middle were removed
    foreign: tuple[str, ...]  # files of a format that this release does not know; they were left as they are

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        words = [f"TensorBoard: {self.points} points of step {self.first_step} and later are removed; they are written anew"]
        if self.unreadable:
            kept = f"; the files as they were: {', '.join(self.kept)}" if self.kept else ""
            words.append(f"{self.unreadable} bytes that cannot be read are removed{kept}")
        if self.foreign:
            words.append(f"left as they are, in a format that is not known here: {', '.join(self.foreign)}")
        return ". ".join(words)
