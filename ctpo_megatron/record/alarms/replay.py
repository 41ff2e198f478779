"""Alarms over what a run directory holds: for a run that goes on, and for trying thresholds on one that is over.

A run that goes on has what its alarms remembered in its checkpoint, and reads the rows and events since. Where there is no such
memory, or settings are others now, it reads all rows that it keeps. So it has the alarms that it would have without the break.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from ctpo_megatron.errors import InputError, storing
from ctpo_megatron.record.alarm_events import AlarmCleared, AlarmRaised
from ctpo_megatron.record.alarms.signals import Row
from ctpo_megatron.record.alarms.watch import Alarms
from ctpo_megatron.record.story import Happened, read_events

GONE = "the run went back behind it, or its settings are others now"
Told = AlarmRaised | AlarmCleared
Memory = dict[str, Any]
"""JSON values: what `Alarms.memory` returns, and `events`, how many lines of events.jsonl they have heard."""


def replay(alarms: Alarms, run_dir: Path) -> list[Told]:
    """Feed `alarms` with all rows and events in `run_dir`; returns what was raised and cleared, in order.

    An event stands before the first row that was written after it. Raises InputError for files that are damaged.
    """
    return _feed(alarms, read_rows(run_dir / "metrics.jsonl"), read_events(run_dir / "events.jsonl")[0])


def settle(
    make: Callable[[], Alarms], run_dir: Path, memory: Memory | None = None, size: int | None = None
) -> tuple[Alarms, list[Told], int]:
    """Returns alarms as `make` makes them where the run in `run_dir` is, what is left to be told, and the events they have heard.

    What is left to be told is the end of alarms that the run told of and that do not stand, as it went back behind them; and the
    beginning of those that stand untold. So raised and cleared take turns in events.jsonl, whatever happened between.
    `memory`: of the run's checkpoint. `size`: bytes of events.jsonl that are looked at; None: all.
    """
    metrics, path = run_dir / "metrics.jsonl", run_dir / "events.jsonl"
    alarms = _remembered(make(), metrics, memory)
    skip = 0 if alarms is None or memory is None else int(memory["events"])
    events, heard = read_events(path, skip, size)
    if alarms is None:
        alarms = make()
    elif heard < skip:  # the file is another one
        alarms, (events, heard) = make(), read_events(path, 0, size)
    open_ones: dict[str, Mapping[str, Any]] = {name: asdict(each) for name, each in alarms.standing.items()}
    _feed(alarms, read_rows(metrics, alarms.rows), events)
    _follow(open_ones, events)
    ends = [_gone(name, fields) for name, fields in open_ones.items() if name not in alarms.standing]
    return alarms, [*ends, *(each for name, each in alarms.standing.items() if name not in open_ones)], heard


def _remembered(alarms: Alarms, metrics: Path, memory: Memory | None) -> Alarms | None:
    """Returns `alarms` as `memory` has them, None where it is not of these rows and settings."""
    try:
        if memory is None or not isinstance(memory["events"], int) or not alarms.restore(memory):
            return None
    except (ValueError, TypeError, KeyError):  # of another release
        return None
    if alarms.rows == 0:
        return alarms
    last = next(read_rows(metrics, alarms.rows - 1), None)
    return alarms if last is not None and (last["step"], last["time"]) == alarms.last else None


def _feed(alarms: Alarms, rows: Iterator[Row], events: Sequence[Happened]) -> list[Told]:
    told: list[Told] = []
    at = 0
    for row in rows:
        while at < len(events) and events[at].time <= row["time"]:
            alarms.event(events[at])
            at += 1
        told += alarms.row(row)
    for event in events[at:]:
        alarms.event(event)
    return told


def _follow(open_ones: dict[str, Mapping[str, Any]], events: Sequence[Happened]) -> None:
    """Bring `open_ones`, the alarms that were told of and not the end of, by name, to where they are after `events`."""
    for event in events:
        name = event.fields.get("alarm")
        if event.name == AlarmRaised.name and isinstance(name, str):
            open_ones[name] = event.fields
        elif event.name == AlarmCleared.name:
            open_ones.pop(str(name), None)


def _gone(name: str, fields: Mapping[str, Any]) -> AlarmCleared:
    step = int(fields.get("step", 0))
    return AlarmCleared(name, str(fields.get("where", "")), step, step, GONE)


def read_rows(path: Path, skip: int = 0) -> Iterator[Row]:
    """Yields the rows of a metrics.jsonl behind the first `skip`, none where it is not there. A last line without its end is left
    out.

    Raises InputError, which names the line, for one that is no row.
    """
    if not path.exists():
        return
    with storing(path), path.open("rb") as file:
        for number, line in enumerate(islice(file, skip, None), skip + 1):
            if line.endswith(b"\n"):
                yield _row(line, f"{path} line {number}")


def _row(line: bytes, where: str) -> Row:
    try:
        row = {name: float(value) for name, value in msgspec.json.decode(line).items()}
        row["step"], row["time"]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{where}: a row is an object of numbers with `step` and `time`: {error!r}") from error
    return row
