"""Events of steps that went wrong in their numbers: what was not finite, and what left the run's course."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event


@dataclass(frozen=True, slots=True)
class StepSkipped(Event):
    """An optimizer step was not applied, as something in it was not finite; what was left of its training step was left out."""

    name: ClassVar[str] = "step skipped"
    step: int  # training step, from 1
    optimizer_step: int  # of it, from 1
    optimizer_steps: int  # that it was to have
    applied: int  # of them, before this one
    reason: str
    in_a_row: int  # training steps that were skipped like this one, with none in between that was done
    limit: int
    dump: str | None  # None: none was written
    dump_bytes: int  # that it added to the disk

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        which = f"step {self.step}" if self.optimizer_steps == 1 else f"step {self.step}, optimizer step {self.optimizer_step}"
        kept = f"; the {self.applied} optimizer steps before it stay" if self.applied else ""
        size = f"{self.dump_bytes / 2**20:,.1f} MiB"
        look = "" if self.dump is None else f" Look at it with `ctpo replay {self.dump}` ({size})."
        return f"{which} is not applied{kept}: {self.reason}{look} ({self.in_a_row} in a row; the run stops at {self.limit})"


@dataclass(frozen=True, slots=True)
class DumpLost(Event):
    """The dump of a step that was skipped could not be written; nothing of it is left."""

    name: ClassVar[str] = "dump lost"
    step: int
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"the dump of step {self.step} could not be written: {self.reason}"


@dataclass(frozen=True, slots=True)
class WentBack(Event):
    """The run left its course and is back at an earlier checkpoint; the prompts of `groups` groups are passed over."""

    name: ClassVar[str] = "went back"
    left: int  # the training step that showed it
    step: int
    groups: int

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"back from step {self.left} to step {self.step}; the {self.groups} groups in between are passed over"


@dataclass(frozen=True, slots=True)
class OffCourse(Event):
    """A metric has been far from what it was: `kind` is `loss spike` or `reward collapse`."""

    name: ClassVar[str] = "off course"
    kind: str
    step: int
    metric: str
    value: float
    median: float  # of the steps before
    deviations: float  # between them, in the deviations of the steps before
    limit: float

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return (
            f"{self.kind} at step {self.step}: {self.metric} is {self.value:.4g}, {self.deviations:.1f} deviations from "
            f"{self.median:.4g}, its median over the steps before (limit {self.limit:g})"
        )
