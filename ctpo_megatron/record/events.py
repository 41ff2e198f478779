"""What happens in a run, as typed events: one object a line in RUN_DIR/events.jsonl, and for some a sentence on the console.

The part that sees something happen emits an event and knows nothing of its readers. A line holds `time` (seconds since 1970),
`event` (the class's `name`) and the fields of the class. Events are history: a run that is resumed appends to those of before.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from ctpo_megatron.errors import storing
from ctpo_megatron.record.files import GrowingFile, Through, at_once, drop_half_line, jsonable


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. Subclasses have a `name` and a `sentence` of their own.

    `console`: whether its sentence is printed; what would only be noise there is False.
    """

    name: ClassVar[str]
    console: ClassVar[bool] = True

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        raise NotImplementedError(f"{type(self).__name__} has no sentence")


Emit = Callable[[Event], None]


def discard(_event: Event) -> None:
    """Drop an event: for parts that are used outside a run."""


def print_sentence(event: Event) -> None:
    """Print an event's sentence, where its class is one for the console."""
    if event.console:
        with contextlib.suppress(OSError):  # the console may be a file on the disk that is full; it comes with the next sentence
            print(event.sentence, flush=True)


class EventLog:
    """Appends events to a file and hands each to `readers`; complete after every line. Call it to emit.

    The file and its directory are made by the first event. `through`: how lines are written.
    """

    def __init__(self, path: Path, readers: Iterable[Emit] = (), through: Through = at_once) -> None:
        self._path, self._through = path, through
        self._file: GrowingFile | None = None
        self._readers = tuple(readers)

    def __call__(self, event: Event, at: float | None = None) -> None:
        """Tell the readers of `event` and write it down. Raises StorageError where the disk does not take it.

        `at`: when it happened, seconds since 1970; None: now.
        """
        line = {"time": round(time.time() if at is None else at, 3), "event": event.name, **jsonable(asdict(event))}
        for reader in self._readers:  # first: they hear it also where the disk is full
            reader(event)
        if self._file is None:
            self._file = self._open()
        self._file.append_line(json.dumps(line, allow_nan=False))

    def _open(self) -> GrowingFile:
        with storing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        drop_half_line(self._path)
        return GrowingFile(self._path, self._through)

    def close(self) -> None:
        """Close the file. Safe to call twice; an event that comes later opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True, slots=True)
class DataRead(Event):
    """A file of prompts or demonstrations was read. `different`: rows that say something else to the model than those before."""

    name: ClassVar[str] = "data read"
    file: str
    rows: int
    different: int
    ignored: tuple[str, ...]  # columns that were not used

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        words = f"{self.file}: {self.rows:,} rows"
        if self.different < self.rows:
            words += f", {self.different:,} different ones: each {self.rows / self.different:.1f} times on average"
        return words + (f"; columns that are not used: {', '.join(self.ignored)}" if self.ignored else "")


@dataclass(frozen=True, slots=True)
class RunReady(Event):
    """All processes are up and, where there are servers, the first weights are proven on them."""

    name: ClassVar[str] = "ready"
    seconds: float  # since the command began

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"ready after {self.seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class RunResumed(Event):
    """The run goes on from a checkpoint. What is counted was trained on, not only sampled."""

    name: ClassVar[str] = "resumed"
    checkpoint: str
    step: int  # training steps that are done
    optimizer_steps: int
    prompts: int
    samples: int | None  # None: the release that began the run did not count them

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        samples = "" if self.samples is None else f", {self.samples} samples"
        done = f"{self.prompts} prompts{samples}, {self.optimizer_steps} optimizer steps"
        return f"resumed from {self.checkpoint} at step {self.step} ({done})"


@dataclass(frozen=True, slots=True)
class SettingDiffers(Event):
    """A run that resumes has another setting than the checkpoint's configuration. Values are as they stand in YAML."""

    name: ClassVar[str] = "setting differs"
    key: str
    before: str  # the checkpoint's
    now: str
    effect: str  # applies, none or refused
    meaning: str  # what that is, for a person

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"{self.key}: {self.before} in the checkpoint, {self.now} now: {self.meaning}"


@dataclass(frozen=True, slots=True)
class SettingsUnknown(Event):
    """A run resumes from a checkpoint that does not hold the configuration that made it."""

    name: ClassVar[str] = "settings unknown"
    checkpoint: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return (
            f"{self.checkpoint} was written by a release that kept no configuration in it: which settings differ cannot be told; "
            "the present ones apply"
        )


@dataclass(frozen=True, slots=True)
class StepTrained(Event):
    """A training step is done: its weights are published, and it was evaluated and saved where that was due. It counts from 1."""

    name: ClassVar[str] = "step"
    console: ClassVar[bool] = False  # the recorder prints the numbers of a step
    step: int
    seconds: float  # with its evaluation and the standing still for its checkpoint
    phases: dict[str, float] = field(default_factory=dict)  # seconds by phase, in their order; what is missing lay between them
    rollout_tail: float = 0.0  # seconds of the rollout after 80 % of the step's groups were in

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"step {self.step} done in {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class EvaluationDone(Event):
    """The policy after `step` training steps was evaluated. `benchmarks`: accuracy of each, `accuracy` is their mean."""

    name: ClassVar[str] = "evaluation"
    console: ClassVar[bool] = False  # the recorder prints its numbers
    step: int
    accuracy: float
    seconds: float  # that training stood still for it
    took_s: float = 0.0  # from its beginning to its end
    benchmarks: dict[str, float] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"evaluation after step {self.step}: accuracy {self.accuracy:.1%}, {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class WeightsPublished(Event):
    """`servers` servers are proven to hold `version`."""

    name: ClassVar[str] = "published"
    console: ClassVar[bool] = False  # once a step
    version: int
    servers: int
    seconds: float

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"version {self.version} of the weights is on {self.servers} servers after {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class ServerLost(Event):
    """A server died or failed once too often. `again`: it is being started again in its place."""

    name: ClassVar[str] = "server lost"
    server: str
    reason: str
    again: bool

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"{self.server} is lost: {self.reason}"


@dataclass(frozen=True, slots=True)
class ServerRestarted(Event):
    """A server that was lost answers again; it does not hold the current weights yet."""

    name: ClassVar[str] = "server restarted"
    server: str
    url: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"{self.server} is back at {self.url}"


@dataclass(frozen=True, slots=True)
class ServerSuspended(Event):
    """A server failed; nothing is sampled from it before a publication to it has succeeded."""

    name: ClassVar[str] = "server suspended"
    server: str
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"{self.server} is suspended: {self.reason}"


@dataclass(frozen=True, slots=True)
class ServerServing(Event):
    """A server that had failed, or was started again, serves again."""

    name: ClassVar[str] = "server serving"
    server: str
    version: int

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"{self.server} serves again, with version {self.version}"


@dataclass(frozen=True, slots=True)
class CheckpointVerified(Event):
    """The checkpoint after `step` training steps was read back, compared and named."""

    name: ClassVar[str] = "checkpoint verified"
    step: int
    seconds: float  # since its save began

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"checkpoint of step {self.step} verified after {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class CheckpointLost(Event):
    """A save in flight failed while the run was ending for another reason."""

    name: ClassVar[str] = "checkpoint lost"
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"the checkpoint in flight is lost: {self.reason}"


@dataclass(frozen=True, slots=True)
class CheckpointDamaged(Event):
    """A checkpoint is not what was written; it was set aside. `instead`: the one to go on from, None where there is none."""

    name: ClassVar[str] = "checkpoint damaged"
    reason: str
    kept_as: str
    instead: str | None

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        then = f"going on from {self.instead}" if self.instead else "there is none before it"
        return f"damaged checkpoint: {self.reason} It is kept as {self.kept_as}; {then}"


@dataclass(frozen=True, slots=True)
class RunDone(Event):
    """The run came to its end."""

    name: ClassVar[str] = "done"
    steps: int
    seconds: float
    summary: str  # where its numbers are

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"train: {self.steps} steps in {self.seconds:.0f} s; {self.summary}"
