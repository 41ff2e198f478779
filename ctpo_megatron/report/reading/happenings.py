"""events.jsonl as a story, and its lines as sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ctpo_megatron.errors import InputError
from ctpo_megatron.record.sentences import sentence as say
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
    return say(happened.name, happened.fields)
