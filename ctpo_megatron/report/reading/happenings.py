"""events.jsonl as a story, and its lines as sentences."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ctpo_megatron import record
from ctpo_megatron.errors import InputError
from ctpo_megatron.record.events import Event
from ctpo_megatron.record.story import Happened, Story, tell
from ctpo_megatron.report.reading.lines import Complaints, number


def read_happened(rows: Iterable[Mapping[str, Any]], complaints: Complaints) -> Story:
    """Returns the story of the file's lines. Lines that are no events are left out, with a complaint."""
    found, damaged = list[Happened](), 0
    for row in rows:
        time, name = number(row.get("time")), row.get("event")
        if time is None or not math.isfinite(time) or not isinstance(name, str):
            damaged += 1
            continue
        found.append(Happened(time, name, {key: value for key, value in row.items() if key not in ("time", "event")}))
    if damaged:
        complaints.append(f"events.jsonl: {damaged:,} lines are no events and were left out")
    try:
        return tell(found, "events.jsonl")
    except (InputError, KeyError, TypeError, ValueError):
        complaints.append("events.jsonl: incarnations are not counted 1, 2, 3: goodput and incarnations are left out")
        return Story((), tuple(found))


def everything(story: Story) -> list[Happened]:
    """Returns all that happened, in the order in which it was written."""
    told = [event for each in story.incarnations for event in (*each.events, *each.after)]
    return [*story.earlier, *told]


def sentence(happened: Happened) -> str:
    """Returns an event for a person, also one that this release does not know."""
    kind = _kinds().get(happened.name)
    if kind is not None:
        names = {each.name for each in fields(kind)}
        known = {key: _frozen(value) for key, value in happened.fields.items() if key in names}
        # of another release fields may be missing, or be of another type
        with contextlib.suppress(TypeError, ValueError, AttributeError, LookupError, ArithmeticError, OSError):
            return kind(**known).sentence
    return ", ".join(f"{key} {value}" for key, value in happened.fields.items()) or happened.name


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _kinds() -> dict[str, type[Event]]:
    """Returns the events that this release knows, by their names."""
    for module in pkgutil.iter_modules(record.__path__):
        if module.name.endswith("events") and module.name != "tfevents":
            importlib.import_module(f"{record.__name__}.{module.name}")
    return {kind.name: kind for kind in _below(Event)}


def _below(kind: type[Event]) -> Iterable[type[Event]]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)
