"""Robust numbers of a series: medians, what its noise is, and when it was last at its best.

Medians and median absolute deviations (MAD) are used throughout: single wild values, which every long run has, do not move them.
All numbers that come in are finite.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from itertools import pairwise

NORMAL = 1.4826  # standard deviations of normal noise in one MAD
PAIR = 2**0.5  # standard deviations of a difference of two values in one of a value
SMALLEST = 1e-12
SURE = 2.0  # deviations by which something has to be better than the best


class Recent:
    """The last `size` values. `full`: whether so many have come."""

    def __init__(self, size: int) -> None:
        self.values: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> None:
        """Take `value`; the oldest goes."""
        self.values.append(value)

    @property
    def full(self) -> bool:
        """Returns whether `size` values are there."""
        return len(self.values) == self.values.maxlen

    @property
    def median(self) -> float:
        """Returns the median; there is a value."""
        return statistics.median(self.values)


def deviation(values: Iterable[float], middle: float) -> float:
    """Returns the standard deviation about `middle`, as normal noise with this MAD has it; of no values 0."""
    distances = [abs(each - middle) for each in values]
    return NORMAL * statistics.median(distances) if distances else 0.0


def jitter(values: Iterable[float]) -> float:
    """Returns the standard deviation of the noise of a series that may have a trend, from its successive differences."""
    pairs = [later - earlier for earlier, later in pairwise(values)]
    return deviation(pairs, 0.0) / PAIR


class Baseline:
    """The median and deviation of the first `size` values; None before so many have come. `floor`: of the median, the least."""

    def __init__(self, size: int, floor: float) -> None:
        self._values = Recent(size)
        self._floor = floor
        self.median: float | None = None
        self.deviation = 0.0

    def add(self, value: float) -> None:
        """Take `value`, where one is still missing."""
        if self.median is not None:
            return
        self._values.add(value)
        if self._values.full:
            self.median = self._values.median
            self.deviation = max(deviation(self._values.values, self.median), self._floor * abs(self.median), SMALLEST)


class Best:
    """When a noisy series, smoothed by the median of `smooth` values, was at its best: it has to beat the best by its noise.

    `age`: values since then. `better`: whether the last value made a new best. Nothing counts before `smooth` values have come.
    """

    def __init__(self, smooth: int, *, noise_of: int = 40, least: float = 0.005) -> None:
        self._recent, self._noise, self._least = Recent(smooth), Recent(noise_of), least
        self.value: float | None = None
        self.now = 0.0
        self.age = 0
        self.better = False

    def add(self, value: float) -> None:
        """Take the next `value` of the series."""
        self._recent.add(value)
        self._noise.add(value)
        self.better = False
        if not self._recent.full:
            return
        self.now, self.age = self._recent.median, self.age + 1
        if self.value is None or self.now > self.value + self.margin():
            self.value, self.age, self.better = self.now, 0, True

    @property
    def ready(self) -> bool:
        """Returns whether there is a best."""
        return self.value is not None

    def margin(self) -> float:
        """Returns by how much a value has to differ from the best to be another one."""
        # deviations of the difference of two medians of `smooth` values: a median's is 1.25 times a mean's
        smooth = self._recent.values.maxlen or 1
        return max(SURE * 1.25 * PAIR * jitter(self._noise.values) / math.sqrt(smooth), self._least)
