"""What a window of ratios would clip at each position, from the counts of ratios.jsonl."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ctpo_megatron.report.reading.lines import number

TOTAL, BY_ROOT = 0, 1  # the two distributions of a line: of S_t, of S_t / sqrt(t)
NEGATIVE, ZERO, POSITIVE = 0, 1, 2  # signs of the advantage
TAIL = 0.001
SMALLEST = 0.02


@dataclass(frozen=True, slots=True)
class Window:
    """Bounds of a log-ratio: -low and high; `dual` bounds it from above where the advantage is negative."""

    low: float
    high: float
    dual: float = math.inf


@dataclass(slots=True)
class Counts:
    """Counts of some steps added up: [distribution][sign][first position of a range] is a list by bucket.

    `borders`: of each distribution's buckets, nats. `tokens`, `clipped`: by the first position, of the run's own objective.
    """

    borders: tuple[list[float], list[float]] = ([], [])
    of: list[list[dict[int, list[float]]]] = field(default_factory=lambda: [[{} for _ in range(3)] for _ in range(2)])
    tokens: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    clipped: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    steps: int = 0

    def positions(self) -> list[int]:
        """Returns the first positions of the ranges that have tokens."""
        return sorted({position for sign in self.of[TOTAL] for position in sign})


def read_counts(lines: Iterable[Mapping[str, Any]]) -> Counts:
    """Returns the lines of a ratios.jsonl added up. Lines that are none, or have other borders than the first, are left out."""
    found, buckets = Counts(), 0
    for line in lines:
        try:
            finest, reach, counts = [float(each) for each in line["finest"]], float(line["reach"]), line["counts"]
            size = len(next(iter(next(each for each in counts[TOTAL] if each).values())))
            borders = tuple([each * math.sinh(reach * (2 * place / size - 1)) for place in range(size + 1)] for each in finest)
            if buckets and borders != found.borders:
                continue
            _add(found, line, counts, size)
        except (KeyError, TypeError, ValueError, StopIteration, IndexError, AttributeError, OverflowError):
            continue
        buckets, found.borders = size, (borders[0], borders[1])
        found.steps += 1
    return found


def _add(found: Counts, line: Mapping[str, Any], counts: Sequence[Any], size: int) -> None:
    for kind in (TOTAL, BY_ROOT):
        for sign in (NEGATIVE, ZERO, POSITIVE):
            for position, row in counts[kind][sign].items():
                if len(row) != size:
                    raise ValueError(f"{len(row)} buckets")
                before = found.of[kind][sign].get(int(position), [0.0] * size)
                found.of[kind][sign][int(position)] = [old + new for old, new in zip(before, row, strict=True)]
    for name, sums in (("tokens", found.tokens), ("clipped", found.clipped)):
        for position, value in line[name].items():
            sums[int(position)] += number(value) or 0.0


def clip_rate(counts: Counts, kind: int, window: Window, position: int) -> float | None:
    """Returns the share of the tokens of a range that a window clips; None of no token.

    A token is clipped where its advantage pushes it on beyond a bound. Within a bucket tokens count as evenly spread.
    """
    borders = counts.borders[kind]
    rows = [counts.of[kind][sign].get(position, []) for sign in (NEGATIVE, ZERO, POSITIVE)]
    whole = sum(map(sum, rows))
    if not whole:
        return None
    clipped = _above(rows[POSITIVE], borders, window.high) + _above(rows[NEGATIVE], borders, window.dual)
    clipped += sum(rows[NEGATIVE]) - _above(rows[NEGATIVE], borders, -window.low)
    return clipped / whole


def _above(row: Sequence[float], borders: Sequence[float], bound: float) -> float:
    """Returns how many of a row's tokens lie above `bound`."""
    found = 0.0
    for count, (low, high) in zip(row, pairwise(borders), strict=False):
        found += count * min(1.0, max(0.0, (high - bound) / (high - low)))
    return found


def density(counts: Counts, position: int) -> list[tuple[float, float, float]]:
    """Returns the density of S_t in a range as (from, to, share of the tokens by nat), from left to right.

    Neighbouring buckets are joined until they hold SMALLEST of the tokens, so that chance does not look like a shape; the
    outermost TAIL at either side is left out: single tokens far out would hide the rest.
    """
    borders, rows = counts.borders[TOTAL], [sign.get(position, []) for sign in counts.of[TOTAL]]
    row = [sum(each) for each in zip(*[each for each in rows if each], strict=True)]
    whole, found, below = sum(row), list[tuple[float, float, float]](), 0.0
    begin, held = borders[0], 0.0
    for count, (low, high) in zip(row, pairwise(borders), strict=True):
        if below + count <= TAIL * whole or below >= (1 - TAIL) * whole:
            begin, held = high, 0.0
        else:
            begin, held = (begin, held + count) if held else (low, count)
            if held >= SMALLEST * whole or below + count >= (1 - TAIL) * whole:
                found.append((begin, high, held / whole / (high - begin)))
                begin, held = high, 0.0
        below += count
    return found
