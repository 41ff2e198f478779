"""Numbers that alarms judge, out of the rows of metrics: one metric, the worst of a family, or what follows from several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ctpo_megatron.record.alarms.series import Recent

Row: TypeAlias = Mapping[str, float]
"""One line of metrics.jsonl: `step`, `time` (seconds since 1970) and metrics; numbers that are not finite are in it as such."""

DECILES = 10


@dataclass(frozen=True, slots=True)
class Seen:
    """A finite `value`, and `where` it was found: the name of a metric, or of what stands behind it."""

    value: float
    where: str


Signal = Callable[[Row], Seen | None]
"""Takes every row in its order; returns nothing for one that says nothing."""


def metric(name: str) -> Signal:
    """Returns the signal of the metric `name`."""

    def of(row: Row) -> Seen | None:
        value = row.get(name, math.nan)
        return Seen(value, name) if math.isfinite(value) else None

    return of


def largest(prefix: str) -> Signal:
    """Returns the largest of the metrics whose names begin with `prefix`."""

    def of(row: Row) -> Seen | None:
        found = [(value, name) for name, value in row.items() if name.startswith(prefix) and math.isfinite(value)]
        return Seen(*max(found)) if found else None

    return of


def share(part: str, whole: float) -> Signal:
    """Returns the metric `part` divided by `whole`, which is more than 0."""

    def of(row: Row) -> Seen | None:
        value = row.get(part, math.nan)
        return Seen(value / whole, part) if math.isfinite(value) else None

    return of


class ClippedDeciles:
    """The largest clip fraction of a tenth of the trajectories, each smoothed by the median of `smooth` rows."""

    def __init__(self, smooth: int) -> None:
        self._deciles = [Recent(smooth) for _ in range(DECILES)]

    def __call__(self, row: Row) -> Seen | None:
        """Returns the largest, with the name of its metric."""
        if not _take_deciles(self._deciles, row):
            return None
        found = [(each.median, decile(k)) for k, each in enumerate(self._deciles) if each.full]
        return Seen(*max(found)) if found else None


class ClipTilt:
    """How much more is clipped in the last three tenths of the trajectories than in the first three, over `smooth` rows."""

    def __init__(self, smooth: int) -> None:
        self._recent = Recent(smooth)

    def __call__(self, row: Row) -> Seen | None:
        """Returns the difference of clip fractions."""
        first, last = ([row.get(decile(k), math.nan) for k in part] for part in (range(3), range(DECILES - 3, DECILES)))
        if not _any_finite(first) or not _any_finite(last):
            return None
        self._recent.add(_mean(last) - _mean(first))
        return Seen(self._recent.median, "health/clip_fraction, last three deciles less the first") if self._recent.full else None


class LateDrift:
    """The drift of the latest positions over that of the first: of those in the row, the last over the first.

    Nothing where the last have less than `least` nats.
    """

    def __init__(self, least: float) -> None:
        self._least = least

    def __call__(self, row: Row) -> Seen | None:
        """Returns the ratio."""
        prefix = "drift/from_token_"
        places = sorted(int(name.removeprefix(prefix)) for name in row if name.startswith(prefix))
        values = [row[f"{prefix}{place}"] for place in places]
        if len(values) < 2 or not (math.isfinite(values[0]) and math.isfinite(values[-1]) and values[0] > 0):
            return None
        if values[-1] < self._least:
            return None
        return Seen(values[-1] / values[0], f"{prefix}{places[-1]} over {prefix}{places[0]}")


class Aborted:
    """The share of groups that became too old among those that steps asked for, over `window` steps of `groups` each."""

    def __init__(self, groups: int, window: int) -> None:
        self._groups, self._recent = groups, Recent(window)

    def __call__(self, row: Row) -> Seen | None:
        """Returns the share."""
        value = row.get("ledger/aborted", math.nan)
        if not math.isfinite(value):
            return None
        self._recent.add(value)
        lost, made = sum(self._recent.values), self._groups * len(self._recent.values)
        return Seen(lost / (lost + made), "ledger/aborted") if self._recent.full else None


class MixedGroups:
    """The share of groups whose rewards differ. `solved`: whether the others are equal because all of their answers are good.

    In the median of `smooth` rows. Groups that differ are taken to have half of the reward, which is at most 1; the mean of the
    others follows from that, and `enough` of it is good.
    """

    def __init__(self, smooth: int, enough: float) -> None:
        self._enough, self._mixed, self._rewards = enough, Recent(smooth), Recent(smooth)

    def __call__(self, row: Row) -> Seen | None:
        """Returns the share; None where a critic learns, which equal groups teach as well."""
        if "critic/loss" in row:
            return None
        mixed, reward = row.get("reward/mixed_groups", math.nan), row.get("reward/mean", math.nan)
        if not (math.isfinite(mixed) and math.isfinite(reward)):
            return None
        self._mixed.add(mixed)
        self._rewards.add(reward)
        return Seen(mixed, "reward/mixed_groups")

    def solved(self) -> bool:
        """Returns whether equal groups are good ones."""
        mixed = self._mixed.median
        return self._rewards.median - mixed / 2 >= self._enough * (1 - mixed)


class TailTime:
    """Seconds that steps wait for the last fifth of their groups.

    `short`: whether that is less than `share` of the rollout by now, in the median of `smooth` steps.
    """

    def __init__(self, smooth: int, share: float) -> None:
        self._share, self._shares = share, Recent(smooth)

    def __call__(self, row: Row) -> Seen | None:
        """Returns the seconds."""
        tail, rollout = row.get("time/rollout_tail", math.nan), row.get("time/rollout", math.nan)
        if not (math.isfinite(tail) and rollout > 0):
            return None
        self._shares.add(tail / rollout)
        return Seen(tail, "time/rollout_tail")

    def short(self) -> bool:
        """Returns whether the tail is short."""
        return not self._shares.values or self._shares.median < self._share


class UsefulTime:
    """Goodput of the last `window` steps: seconds of rollouts and training over all that passed since the step before them.

    What passed between the end of a process that worked on the run and the beginning of the next one is left out: nobody may have
    been allocated. What was trained and is made again counts as passed.
    """

    USEFUL = ("time/rollout", "time/batch", "time/train")

    def __init__(self, window: int) -> None:
        self._useful, self._passed = Recent(window), Recent(window)
        self._last: float | None = None  # when the time that is to be counted next begins
        self._owed = 0.0  # seconds that passed behind the last step of a process that has ended

    def ended(self, at: float) -> None:
        """The process that worked on the run ended at `at`, seconds since 1970."""
        if self._last is not None:
            self._owed, self._last = max(at - self._last, 0.0), None

    def began(self, at: float) -> None:
        """A process began to work on the run at `at`; the start of the first one is no loss."""
        if self._useful.values:
            self._last, self._owed = at - self._owed, 0.0

    def __call__(self, row: Row) -> Seen | None:
        """Returns the share, once `window` steps were seen."""
        useful = [row.get(name, math.nan) for name in self.USEFUL]
        if "time/step" not in row or not all(map(math.isfinite, useful)):
            return None
        last, self._last = self._last, row["time"]
        passed = row["time"] - last if last is not None else row["time/step"]
        self._useful.add(sum(useful))
        self._passed.add(max(passed, sum(useful)))
        if not self._useful.full or sum(self._passed.values) <= 0:
            return None
        return Seen(sum(self._useful.values) / sum(self._passed.values), "goodput")


def decile(k: int) -> str:
    """Returns the name of the clip fraction of the k-th tenth, from 0."""
    return f"health/clip_fraction/decile_{k}"


def _take_deciles(into: Sequence[Recent], row: Row) -> bool:
    values = [row.get(decile(k), math.nan) for k in range(DECILES)]
    for each, value in zip(into, values, strict=True):
        if math.isfinite(value):
            each.add(value)
    return _any_finite(values)


def _any_finite(values: Iterable[float]) -> bool:
    return any(map(math.isfinite, values))


def _mean(values: Iterable[float]) -> float:
    finite = [each for each in values if math.isfinite(each)]
    return sum(finite) / len(finite)
