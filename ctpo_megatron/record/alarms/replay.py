"""Alarms over what a run directory holds: for a run that goes on, and for trying thresholds on one that is over.

A run that goes on reads its own rows again, those that it keeps, and so has the alarms that it would have without the break.
There is no file of alarms' state that could disagree with the metrics, or be of another step than the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ctpo_megatron.errors import InputError, storing
from ctpo_megatron.record.alarm_events import AlarmCleared, AlarmRaised
from ctpo_megatron.record.alarms.signals import Row
from ctpo_megatron.record.alarms.watch import Alarms
from ctpo_megatron.record.story import Happened, Story, read_story

GONE = "the run went back behind it, or its settings are others now"


def replay(alarms: Alarms, run_dir: Path) -> list[AlarmRaised | AlarmCleared]:
    """Feed `alarms` with all rows and events in `run_dir`; returns what was raised and cleared, in order.

    An event stands before the first row that was written after it. Raises InputError for files that are damaged.
    """
    told: list[AlarmRaised | AlarmCleared] = []
    events = list(all_events(read_story(run_dir / "events.jsonl")))
    at = 0
    for row in read_rows(run_dir / "metrics.jsonl"):
        while at < len(events) and events[at].time <= row["time"]:
            alarms.event(events[at])
            at += 1
        told += alarms.row(row)
    for event in events[at:]:
        alarms.event(event)
    return told


def settle(alarms: Alarms, run_dir: Path) -> list[AlarmRaised | AlarmCleared]:
    """Bring `alarms`, which have seen nothing, to where the run in `run_dir` is; returns what is left to be told.

    That is the end of alarms that the run told of and that do not stand, as it went back behind them; and the beginning of those
    that stand untold. So raised and cleared take turns in events.jsonl, whatever happened between.
    """
    replay(alarms, run_dir)
    open_ones = told_and_open(read_story(run_dir / "events.jsonl"))
    ends = [_gone(name, each.fields) for name, each in open_ones.items() if name not in alarms.standing]
    return [*ends, *(each for name, each in alarms.standing.items() if name not in open_ones)]


def told_and_open(story: Story) -> dict[str, Happened]:
    """Returns the events of the alarms that `story` tells of and not the end of, by the alarm's name."""
    found: dict[str, Happened] = {}
    for event in all_events(story):
        name = event.fields.get("alarm")
        if event.name == AlarmRaised.name and isinstance(name, str):
            found[name] = event
        elif event.name == AlarmCleared.name:
            found.pop(str(name), None)
    return found


def _gone(name: str, fields: Mapping[str, Any]) -> AlarmCleared:
    step = int(fields.get("step", 0))
    return AlarmCleared(name, str(fields.get("where", "")), step, step, GONE)


def all_events(story: Story) -> Iterator[Happened]:
    """Yields the events of a story in their order."""
    yield from story.earlier
    for incarnation in story.incarnations:
        yield from incarnation.events
        yield from incarnation.after


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a metrics.jsonl, none where it is not there. A last line without its end is left out.

    Raises InputError, which names the line, for one that is no row.
    """
    if not path.exists():
        return
    with storing(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                yield _row(line, f"{path} line {number}")


def _row(line: str, where: str) -> Row:
    try:
        row = {name: float(value) for name, value in msgspec.json.decode(line).items()}
        row["step"], row["time"]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{where}: a row is an object of numbers with `step` and `time`: {error!r}") from error
    return row
