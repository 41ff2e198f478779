"""Events of rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event

SHOWN = 300  # characters of a reason on the console


@dataclass(frozen=True, slots=True)
class GroupFailed(Event):
    """An attempt failed more often than it is tried again; its group is not trained on, and another one takes its place."""

    name: ClassVar[str] = "group failed"
    group: str
    attempt: str
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"{self.group} is not trained on: attempt {self.attempt} failed: {' '.join(self.reason.split())[:SHOWN]}"
