"""The alarms of a run: rows of metrics and events in, alarms raised and cleared out."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ctpo_megatron import __version__
from ctpo_megatron.config.alarms import Alarm, AlarmsConfig
from ctpo_megatron.record.alarm_events import AlarmCleared, AlarmRaised
from ctpo_megatron.record.alarms.detectors import Reading
from ctpo_megatron.record.alarms.kinds import Kind, Measure, make_kinds
from ctpo_megatron.record.alarms.memory import recall, remember
from ctpo_megatron.record.alarms.signals import Row
from ctpo_megatron.record.story import Happened

WITHIN = "its readings are well within the limit"


class Latch:
    """Makes one alarm out of readings: raised after `patience` in a row beyond the limit, cleared after `calm` well within.

    Readings between the two end such a row, and leave the alarm as it is. `since`: the first step of the readings that raised it.
    """

    def __init__(self, config: Alarm) -> None:
        self._patience, self._calm = config.patience, config.calm
        self._in_a_row = 0
        self.raised, self.since = False, 0

    def take(self, step: int, reading: Reading) -> bool:
        """Take the next reading; returns whether the alarm was raised or cleared by it."""
        counts = reading.calm if self.raised else reading.over
        if counts and self._in_a_row == 0 and not self.raised:
            self.since = step
        self._in_a_row = self._in_a_row + 1 if counts else 0
        if self._in_a_row < (self._calm if self.raised else self._patience):
            return False
        self.raised, self._in_a_row = not self.raised, 0
        return True


class Alarms:
    """Judges a run by all rows of its metrics, in their order, and by the events between them. Pure: returns what is to be told.

    So its state is a function of metrics.jsonl and events.jsonl, and is had again by reading them (`replay`), or what followed
    upon a `memory` of it. `measure`: what the run is. `standing`: the alarms that are raised, by name. `rows`: how many rows it
    has seen, and `last`, step and time of the last one. Raises ConfigError for a bound on a metric that does not exist.
    """

    def __init__(self, config: AlarmsConfig, measure: Measure) -> None:
        self._warmup = config.warmup
        self._kinds, self._progress = make_kinds(config, measure)
        self._latches = {kind.name: Latch(kind.config) for kind in self._kinds}
        self.standing: dict[str, AlarmRaised] = {}
        self.rows, self.last = 0, (0.0, 0.0)
        settings = config.model_dump_json(exclude={"webhook"})
        self._made_of = json.dumps([__version__, settings, asdict(measure)])

    def memory(self) -> dict[str, Any] | None:
        """Returns all that it remembers, as JSON values for `restore`; None where a number in it is not finite."""
        try:
            state = remember([[kind.detector for kind in self._kinds], self._progress, self._latches])
            standing = {name: remember(asdict(each)) for name, each in self.standing.items()}
        except ValueError:
            return None
        return {"made_of": self._made_of, "rows": self.rows, "last": list(self.last), "state": state, "standing": standing}

    def restore(self, memory: dict[str, Any]) -> bool:
        """Become what `memory` was of, where that had the same settings, and this has seen nothing; returns whether it did so.

        Raises ValueError, TypeError or KeyError for what is no memory of this release; it is of no use then.
        """
        if memory["made_of"] != self._made_of:
            return False
        recall([[kind.detector for kind in self._kinds], self._progress, self._latches], memory["state"])
        self.standing = {name: AlarmRaised(**each) for name, each in memory["standing"].items()}
        step, time = memory["last"]
        self.rows, self.last = int(memory["rows"]), (float(step), float(time))
        return True

    def event(self, happened: Happened) -> None:
        """Hear of an event of the run."""
        for kind in self._kinds:
            kind.detector.event(happened)

    def row(self, row: Row) -> list[AlarmRaised | AlarmCleared]:
        """Returns which alarms the next row raises and clears. Rows of the warm-up are passed over."""
        self.rows, self.last = self.rows + 1, (row["step"], row["time"])
        if row["step"] <= self._warmup:
            return []
        for each in self._progress:
            each.take(row)
        told = []
        for kind in self._kinds:
            reading = kind.detector.row(row)
            if reading is not None and self._latches[kind.name].take(int(row["step"]), reading):
                told.append(self._turned(kind, int(row["step"]), reading))
        return told

    def _turned(self, kind: Kind, step: int, reading: Reading) -> AlarmRaised | AlarmCleared:
        if kind.name in self.standing:
            before = self.standing.pop(kind.name)
            return AlarmCleared(kind.name, before.where, step, before.step, WITHIN)
        raised = AlarmRaised(
            alarm=kind.name,
            where=reading.where,
            step=step,
            since=self._latches[kind.name].since,
            value=reading.value,
            limit=reading.limit,
            what=kind.words.what,
            advice=kind.words.advice,
            then=kind.config.then,
        )
        self.standing[kind.name] = raised
        return raised
