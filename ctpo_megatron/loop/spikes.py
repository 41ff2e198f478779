"""Loss spikes and reward collapses, told from the metrics of the steps before. Pure: who hears of one decides what follows.

The median and the median absolute deviation (MAD) of a window do not move with the outliers that are looked for, as a mean and a
standard deviation would. What is judged is not in the window it is judged by.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ctpo_megatron.config.spikes import SpikeConfig
from ctpo_megatron.record.nonfinite_events import OffCourse

NORMAL = 1.4826  # standard deviations of normal noise in one MAD
FLOOR = 0.02  # of the median: the smallest deviation, for windows in which nothing moves
SMALLEST = 1e-12

Kind = Literal["loss spike", "reward collapse"]
METRICS: dict[Kind, str] = {"loss spike": "train/loss", "reward collapse": "reward/mean"}


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far some values in a row are from what came before."""

    value: float  # of them, the one that is nearest to the median
    median: float
    deviation: float  # one of the window's

    @property
    def deviations(self) -> float:
        """Signed distance in the window's deviations."""
        return (self.value - self.median) / self.deviation


class SpikeDetector:
    """Judges a run step by step. `earlier`: metrics of the steps before, the oldest first, none of which is judged."""

    def __init__(self, config: SpikeConfig, earlier: Sequence[Mapping[str, float]] = ()) -> None:
        self._config = config
        self._limits = {kind: limit for kind, limit in _limits(config).items() if limit is not None}
        self._history = {kind: _finite(each.get(METRICS[kind], math.nan) for each in earlier) for kind in self._limits}

    def step(self, step: int, metrics: Mapping[str, float]) -> list[OffCourse]:
        """Returns what step `step` shows, given its `metrics`; an empty list while all is well. Steps without a metric are
        passed over, and so are values that are not finite: those have a limit of their own (`train.nonfinite_limit`)."""
        found = []
        for kind, limit in self._limits.items():
            value = metrics.get(METRICS[kind], math.nan)
            if not math.isfinite(value):
                continue
            history = self._history[kind]
            history.append(value)
            del history[: -self._config.window - self._config.patience]
            seen = judge(history, limit, above=kind == "loss spike", least=self._config.least, patience=self._config.patience)
            if seen is not None:
                found.append(OffCourse(kind, step, METRICS[kind], seen.value, seen.median, abs(seen.deviations), limit))
        return found


def judge(values: Sequence[float], limit: float, *, above: bool, least: int, patience: int) -> Deviation | None:
    """Returns how far the last `patience` values are off, where each of them is beyond `limit` deviations of the ones before.

    None where one of them is not, or fewer than `least` came before. `above`: larger ones are looked for, otherwise smaller ones.
    """
    before, last = values[:-patience], values[-patience:]
    if len(before) < least:
        return None
    median = statistics.median(before)
    spread = NORMAL * statistics.median(abs(value - median) for value in before)
    deviation = max(spread, FLOOR * abs(median), SMALLEST)
    seen = Deviation(min(last) if above else max(last), median, deviation)
    return seen if (seen.deviations if above else -seen.deviations) > limit else None


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _limits(config: SpikeConfig) -> dict[Kind, float | None]:
    return {"loss spike": config.loss, "reward collapse": config.reward}
