"""What a row of metrics says of one alarm. Detectors are fed every row in its order and keep what they need of it.

A detector knows nothing of alarms that are raised or cleared: `watch.Latch` makes these out of readings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ctpo_megatron.record.alarms.series import Baseline, Recent
from ctpo_megatron.record.alarms.signals import Row, Signal, UsefulTime
from ctpo_megatron.record.events import ServerLost, ServerSuspended
from ctpo_megatron.record.story import Happened
from ctpo_megatron.record.story_events import IncarnationBegan, IncarnationEnded

CALM = 0.1  # of the limit: how far within it a reading is calm; between the two an alarm stays as it is
NOISE = 4.0  # of the first steps' deviations; a change that is less is none
FLOOR = 0.02  # of the first steps' median: their least deviation


@dataclass(frozen=True, slots=True)
class Reading:
    """A judgement: `value` at `where` is beyond the `limit` (`over`), well within (`calm`), or between the two."""

    value: float
    limit: float
    where: str
    over: bool
    calm: bool


class Detector(Protocol):
    """Judges rows of metrics."""

    def row(self, row: Row) -> Reading | None:
        """Returns what the next row says; None where that is nothing."""
        ...

    def event(self, happened: Happened) -> None:
        """Hear of an event of the run, in its place between the rows."""
        ...


class Deaf:
    """A detector that no event means anything to."""

    def event(self, happened: Happened) -> None:
        """Hear of an event."""


def never() -> bool:
    """Returns False: nothing excuses a reading."""
    return False


class Level(Deaf):
    """The median of the last `smooth` values of a signal, against a fixed limit on one side. `excused`: never beyond it then."""

    def __init__(self, signal: Signal, limit: float, *, above: bool, smooth: int, excused: Callable[[], bool] = never) -> None:
        self._signal, self._limit, self._sign, self._excused = signal, limit, 1.0 if above else -1.0, excused
        self._recent = Recent(smooth)

    def row(self, row: Row) -> Reading | None:
        """Returns the judgement of a row that has the signal, once `smooth` did."""
        seen = self._signal(row)
        if seen is None:
            return None
        self._recent.add(seen.value)
        if not self._recent.full:
            return None
        return reading(self._recent.median, self._limit, seen.where, self._sign, excused=self._excused())


class Growth(Deaf):
    """The median of the last `smooth` values against the first `size` ones: beyond `factor` times theirs, and beyond their noise.

    `factor` above 1 looks for growth, below 1 for decline. `least`: a fixed limit that counts too: growth below it is none,
    and decline to less is one always. `excused`: never beyond the limit then.
    """

    def __init__(
        self,
        signal: Signal,
        factor: float,
        *,
        size: int,
        smooth: int,
        least: float = 0.0,
        excused: Callable[[], bool] = never,
    ) -> None:
        self._signal, self._factor, self._least, self._excused = signal, factor, least, excused
        self._sign = 1.0 if factor > 1 else -1.0
        self._baseline, self._recent = Baseline(size, FLOOR), Recent(smooth)

    def row(self, row: Row) -> Reading | None:
        """Returns the judgement of a row that has the signal, once the first ones are known."""
        seen = self._signal(row)
        if seen is None:
            return None
        base = self._baseline
        if base.median is None:
            base.add(seen.value)
            return None
        self._recent.add(seen.value)
        if not self._recent.full:
            return None
        worst = max if self._sign > 0 else min
        limit = worst(self._factor * base.median, base.median + self._sign * NOISE * base.deviation)
        limit = max(limit, self._least)
        return reading(self._recent.median, limit, seen.where, self._sign, excused=self._excused())


class Parts:
    """Several detectors of one alarm: beyond the limit where one of them is, calm where all are that say something."""

    def __init__(self, parts: Sequence[Detector]) -> None:
        self._parts = parts

    def row(self, row: Row) -> Reading | None:
        """Returns the reading of the first part that is beyond its limit, else of the first that is not calm, else of any."""
        readings = [each for each in (part.row(row) for part in self._parts) if each is not None]
        return min(readings, key=lambda each: (not each.over, each.calm), default=None)

    def event(self, happened: Happened) -> None:
        """Let all parts hear of an event."""
        for part in self._parts:
            part.event(happened)


class Losses:
    """How often one server was lost or suspended within the last `within` steps."""

    def __init__(self, limit: int, within: int) -> None:
        self._limit, self._within = limit, within
        self._step = 0.0
        self._lost: list[tuple[float, str]] = []  # the step under way, and the server

    def event(self, happened: Happened) -> None:
        """Count a loss."""
        server = happened.fields.get("server")
        if happened.name in (ServerLost.name, ServerSuspended.name) and isinstance(server, str):
            self._lost.append((self._step + 1, server))

    def row(self, row: Row) -> Reading | None:
        """Returns the judgement of the server that was lost most often; after every training step."""
        if "time/step" not in row:
            return None
        self._step = row["step"]
        self._lost = [(step, server) for step, server in self._lost if step > self._step - self._within]
        servers = [server for _, server in self._lost]
        count, where = max(((servers.count(each), each) for each in servers), default=(0, "servers/lost"))
        return Reading(count, self._limit, where, over=count >= self._limit, calm=count == 0)


class Useful(Deaf):
    """Goodput of the last `window` steps against its limit."""

    def __init__(self, limit: float, window: int) -> None:
        self._limit, self._signal = limit, UsefulTime(window)

    def event(self, happened: Happened) -> None:
        """Hear when processes that work on the run begin and end."""
        if happened.name == IncarnationEnded.name:
            self._signal.ended(_time(happened, "at"))
        if happened.name == IncarnationBegan.name:
            self._signal.began(_time(happened, "process"))

    def row(self, row: Row) -> Reading | None:
        """Returns the judgement after a training step."""
        seen = self._signal(row)
        return None if seen is None else reading(seen.value, self._limit, seen.where, -1.0)


def reading(value: float, limit: float, where: str, sign: float, *, excused: bool = False) -> Reading:
    """Returns the judgement of `value` against `limit`; `sign`: 1 where larger ones are beyond it, -1 where smaller ones are."""
    beyond = sign * (value - limit)
    over = beyond > 0 and not excused
    return Reading(value, limit, where, over=over, calm=excused or beyond < -CALM * abs(limit))


def _time(happened: Happened, field: str) -> float:
    value = happened.fields.get(field)
    return float(value) if isinstance(value, int | float) else happened.time
