"""How fast something grows: the median slope between pairs of readings (Theil and Sen), which single wild ones do not move."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

HOUR = 3600.0
APART_S = 30.0  # between two readings that are kept: 120 an hour
KEPT = 8  # readings that are kept however old they are, as a step may take longer than an hour
LEAST_S = 300.0  # that the readings have to span: what grows while processes start is no leak


def median_slope(at: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """Returns the median slope of all pairs of `values` [n], which are `at` [n], but for pairs at one place; of these alone 0."""
    earlier, later = np.triu_indices(len(at), 1)
    apart, risen = at[later] - at[earlier], values[later] - values[earlier]
    there = apart > 0
    return float(np.median(risen[there] / apart[there])) if there.any() else 0.0


class Slope:
    """Readings of one quantity in the last hour. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._readings: deque[tuple[float, float]] = deque()

    def read(self, value: float) -> float | None:
        """Take a reading in. Returns the slope per hour; None while there is too little to tell."""
        now = self._clock()
        if not self._readings or now - self._readings[-1][0] >= APART_S:
            self._readings.append((now, value))
        while len(self._readings) > KEPT and now - self._readings[0][0] > HOUR:
            self._readings.popleft()
        times, values = np.array(self._readings).T
        if len(times) < 3 or times[-1] - times[0] < LEAST_S:
            return None
        return median_slope(times, values) * HOUR
