"""metrics.jsonl as series."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ctpo_megatron.report.reading.lines import number

Point = tuple[int, float]


@dataclass(frozen=True, slots=True)
class Metrics:
    """A run's numbers: `rows` has each step's by name, in the order of steps; `times` when it was last written, since 1970."""

    rows: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    times: Mapping[int, float] = field(default_factory=dict)
    known: frozenset[str] = frozenset()  # all names in the rows

    @property
    def last_step(self) -> int:
        """Returns the last step that anything is known of; 0 of an empty run."""
        return max(self.rows, default=0)

    def series(self, name: str) -> list[Point]:
        """Returns the finite values of a metric as (step, value), in the order of steps."""
        found = ((step, row.get(name)) for step, row in self.rows.items())
        return [(step, value) for step, value in found if value is not None and math.isfinite(value)]

    def last(self, name: str) -> float | None:
        """Returns a metric's last finite value, None where there is none."""
        return next((value for _, value in reversed(self.series(name))), None)

    def total(self, name: str) -> float:
        """Returns the sum of a metric over all steps."""
        return sum(value for _, value in self.series(name))

    def names(self, pattern: str) -> list[tuple[str, str]]:
        """Returns the metrics whose whole name fits a regular expression, each with its first group, numbers in their order."""
        found = [(name, match[1]) for name in self.known if (match := re.fullmatch(pattern, name))]
        return sorted(found, key=lambda each: (int(each[1]) if each[1].isdigit() else 0, each[1]))


def read_rows(rows: Iterable[Mapping[str, Any]]) -> Metrics:
    """Returns the metrics that lines of the file tell of. Lines of one step are joined, and the later one counts."""
    found: dict[int, dict[str, float]] = {}
    times: dict[int, float] = {}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        values = {name: value for name, given in row.items() if (value := number(given)) is not None}
        values.pop("step")
        times[step] = max(times.get(step, 0.0), values.pop("time", 0.0))
        found.setdefault(step, {}).update(values)
    known = frozenset(name for row in found.values() for name in row)
    return Metrics(dict(sorted(found.items())), times, known)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some steps of a series as one point: the mean, and the smallest and largest value, so that no spike is lost."""

    step: float
    mean: float
    low: float
    high: float


def thinned(points: list[Point], limit: int = 400) -> list[Stretch]:
    """Returns a series in at most `limit` stretches of equally many points; each point is one where there are no more."""
    size = max(1, math.ceil(len(points) / limit))
    stretches = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [
        Stretch(fmean(step for step, _ in part), fmean(value for _, value in part), min(values), max(values))
        for part in stretches
        if (values := [value for _, value in part])
    ]
