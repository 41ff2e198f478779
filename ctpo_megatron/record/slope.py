"""How fast something grows: the slope of a line through its last hour."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

HOUR = 3600.0
APART_S = 30.0  # between two readings that are kept: 120 an hour
KEPT = 8  # readings that are kept however old they are, as a step may take longer than an hour
LEAST_S = 300.0  # that the readings have to span: what grows while processes start is no leak


class Slope:
    """Readings of one quantity. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._readings: deque[tuple[float, float]] = deque()

    def read(self, value: float) -> float | None:
        """Take a reading in. Returns the slope per hour, by least squares; None while there is too little to tell."""
        now = self._clock()
        if not self._readings or now - self._readings[-1][0] >= APART_S:
            self._readings.append((now, value))
        while len(self._readings) > KEPT and now - self._readings[0][0] > HOUR:
            self._readings.popleft()
        times, values = np.array(self._readings).T
        if len(times) < 3 or times[-1] - times[0] < LEAST_S:
            return None
        times, values = times - times.mean(), values - values.mean()
        return float((times * values).sum() / (times * times).sum() * HOUR)
