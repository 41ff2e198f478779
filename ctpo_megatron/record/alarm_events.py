"""Events of alarms: raised once, cleared once, in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event


@dataclass(frozen=True, slots=True)
class AlarmRaised(Event):
    """Something calls for a look. `alarm`: its key in the section `alarms` of the configuration."""

    name: ClassVar[str] = "alarm raised"
    alarm: str
    where: str  # the metric, or the server
    step: int
    since: int  # the first step of the readings in a row that raised it
    value: float
    limit: float
    what: str
    advice: str
    then: str  # what follows besides: tell (nothing), save or stop

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        since = f" since step {self.since}" if self.since != self.step else ""
        return (
            f"ALARM {self.alarm} at step {self.step}: {self.what}: {self.where} is {self.value:.4g}{since}, the limit is "
            f"{self.limit:.4g}. {self.advice}"
        )


@dataclass(frozen=True, slots=True)
class AlarmCleared(Event):
    """An alarm is over. `why`: what ended it, beside the readings."""

    name: ClassVar[str] = "alarm cleared"
    alarm: str
    where: str
    step: int
    raised: int  # the step of its beginning
    why: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"alarm {self.alarm} cleared at step {self.step}, raised at step {self.raised}: {self.why}"


@dataclass(frozen=True, slots=True)
class AlarmsUnsent(Event):
    """The webhook does not take what is sent. Told once until it does; the run goes on, and events.jsonl has all alarms."""

    name: ClassVar[str] = "alarms unsent"
    reason: str
    lost: int  # alarms and ends of alarms that were given up since the command began

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"alarms.webhook: {self.lost} alarms could not be sent: {self.reason}"
