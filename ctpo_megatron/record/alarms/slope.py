"""A number that runs towards its end."""

from __future__ import annotations

import numpy as np

from ctpo_megatron.record.alarms.detectors import CALM, Deaf, Reading
from ctpo_megatron.record.alarms.series import Recent, jitter
from ctpo_megatron.record.alarms.signals import Row, Signal
from ctpo_megatron.record.slope import median_slope

SURE = 4.0  # of the series' noise: the least rise over the window that is none of it


class Slope(Deaf):
    """Steps until a signal reaches `end`, by the median slope of its last `window` values."""

    def __init__(self, signal: Signal, end: float, ahead: int, window: int) -> None:
        self._signal, self._end, self._ahead = signal, end, ahead
        self._values, self._steps = Recent(window), Recent(window)

    def row(self, row: Row) -> Reading | None:
        """Returns the judgement of a row with the signal, once `window` had it: over where the end is within `ahead` steps."""
        seen = self._signal(row)
        if seen is None:
            return None
        self._values.add(seen.value)
        self._steps.add(row["step"])
        if not self._values.full:
            return None
        values, steps = np.array(self._values.values), np.array(self._steps.values)
        slope = median_slope(steps, values)
        risen = slope * float(steps[-1] - steps[0])
        left = self._end - float(np.median(values + slope * (steps[-1] - steps)))  # from where the line is by now
        sure = risen > SURE * jitter(self._values.values)
        ahead = max(left, 0.0) / slope if sure else float("inf")
        over = ahead < self._ahead
        shown = min(ahead, 1e6)  # steps; a number in every file
        return Reading(
            shown, self._ahead, f"steps until {seen.where} is {self._end:g}", over=over, calm=ahead > (1 + CALM) * self._ahead
        )
