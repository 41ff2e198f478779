"""events.jsonl read back: a run's incarnations, one after another, each with what happened in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import InputError
from ctpo_megatron.record.story_events import IncarnationBegan, IncarnationEnded


@dataclass(frozen=True, slots=True)
class Happened:
    """One line of the file. `fields`: those of its event, see the class of that `name`."""

    time: float  # seconds since 1970
    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Incarnation:
    """The events of one process that worked on the run, from the one of its beginning to the last before the next one's.

    `after`: what was written when it was over, as by a command that was refused.
    """

    began: Happened
    events: tuple[Happened, ...]
    ended: Happened | None  # None: it still works, or was killed and no other has come since
    after: tuple[Happened, ...] = ()

    @property
    def number(self) -> int:
        """Counted from 1."""
        return int(self.began.fields["number"])

    @property
    def how(self) -> str | None:
        """Returns how it ended; None where that is not written."""
        return None if self.ended is None else str(self.ended.fields["how"])

    def first(self, name: str) -> Happened | None:
        """Returns its first event of that name."""
        return next((each for each in self.events if each.name == name), None)


@dataclass(frozen=True, slots=True)
class Story:
    """What happened in a run. `earlier`: events of releases that told of no incarnations."""

    incarnations: tuple[Incarnation, ...] = ()
    earlier: tuple[Happened, ...] = ()


def read_story(path: Path) -> Story:
    """Returns the story in an events.jsonl; an empty one where there is no file.

    A last line without its end is left out: the run was killed in the middle of it. Raises InputError, which names the line, for
    anything else that is no event.
    """
    return tell(read_events(path)[0], str(path))


def read_events(path: Path, skip: int = 0, size: int | None = None) -> tuple[list[Happened], int]:
    """Returns the events in an events.jsonl behind the first `skip`, and how many there are in all; none where it is not there.

    `size`: bytes of the file that are looked at; None: all. A last line without its end is left out. Raises InputError, which
    names the line, for one that is no event.
    """
    if not path.exists():
        return [], 0
    with path.open("rb") as file:
        lines = file.read(-1 if size is None else size).split(b"\n")[:-1]
    return [_happened(line, f"{path} line {number}") for number, line in enumerate(lines[skip:], skip + 1)], len(lines)


def tell(events: list[Happened], where: str = "events") -> Story:
    """Returns the story that `events` tell in their order. Raises InputError where incarnations are not counted 1, 2, 3, ..."""
    starts = [index for index, each in enumerate(events) if each.name == IncarnationBegan.name]
    told = tuple(_incarnation(events[start:end]) for start, end in pairwise([*starts, len(events)]))
    numbers = [each.began.fields.get("number") for each in told]
    if numbers != list(range(1, len(told) + 1)):
        raise InputError(f"{where}: incarnations are counted {numbers}; lines were removed, or two files joined. {_CURE}")
    return Story(told, tuple(events[: starts[0]] if starts else events))


_CURE = "Move the file away to begin a new story; the run itself does not need it"


def _incarnation(events: list[Happened]) -> Incarnation:
    at = next((index for index, each in enumerate(events) if each.name == IncarnationEnded.name), None)
    if at is None:
        return Incarnation(events[0], tuple(events), None)
    return Incarnation(events[0], tuple(events[: at + 1]), events[at], tuple(events[at + 1 :]))


def _happened(line: bytes, where: str) -> Happened:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: this is no JSON: {error}. {_CURE}") from error
    if not isinstance(content, dict) or not isinstance(content.get("event"), str):
        raise InputError(f"{where}: an event is an object with `time` and `event`. {_CURE}")
    time = content.pop("time", None)
    if isinstance(time, bool) or not isinstance(time, int | float) or not math.isfinite(time):
        raise InputError(f"{where}: `time` is {time!r}, not seconds since 1970. {_CURE}")
    return Happened(float(time), content.pop("event"), content)
