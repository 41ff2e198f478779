"""Least, mean and most of what matters over windows of steps.

TensorBoard shows 1,000 points of a tag, which it draws by lot: a spike of one step among 50,000 is most likely not there. A point
for each window, with its extremes, leaves nothing out for 1,000 windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ctpo_megatron.record.catalogue import CATALOGUE, find

WINDOW = 100  # steps
PREFIX = "windows/"


@dataclass(slots=True)
class _Span:
    """A metric in a window: extremes, sum and number of its values."""

    least: float
    most: float
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Take a value in. A window with a value that is not a number has no extremes that are."""
        self.least = float(np.minimum(self.least, value))
        self.most = float(np.maximum(self.most, value))
        self.total, self.count = self.total + value, self.count + 1


class Windows:
    """The watched metrics of the window that is open, step after step; windows are the steps 1 to 100, 101 to 200 and so on.

    `before`: steps that were recorded earlier and may belong to it, as (step, metrics).
    """

    def __init__(self, before: Iterable[tuple[int, Mapping[str, float]]] = ()) -> None:
        self._window: int | None = None
        self._spans: dict[str, _Span] = {}
        for step, metrics in before:
            self.add(step, metrics)

    def add(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take a step's metrics in. Returns the window that is over with it, nothing within a window.

        Of `reward/mean` these are `windows/reward/mean` (the mean of its values), `windows/reward/mean/min` and `.../max`. They
        belong to the step that was given, the first after the window: a run that goes back to before it makes them anew.
        """
        window = max(step - 1, 0) // WINDOW
        found = self._closed() if self._window is not None and window != self._window else {}
        self._window = window
        for name, value in metrics.items():
            metric = find(name)
            if metric is not None and metric.watched:
                self._spans.setdefault(name, _Span(value, value)).add(value)
        return found

    def _closed(self) -> dict[str, float]:
        found = {}
        for name, span in self._spans.items():
            found[f"{PREFIX}{name}"] = span.total / span.count
            found[f"{PREFIX}{name}/min"], found[f"{PREFIX}{name}/max"] = span.least, span.most
        self._spans = {}
        return found


def window_begin(step: int) -> int:
    """Returns the first step whose metrics are needed to go on with `step`, the first that is written anew."""
    return (step - 2) // WINDOW * WINDOW + 1


def window_charts() -> dict[str, dict[str, list[str | list[str]]]]:
    """Returns TensorBoard's charts of windows: the mean with the extremes as a band, as `catalogue.charts` has the others.

    The last metric of the catalogue comes first: the page of TensorBoard 2.21 shows charts with bands, and these only, from the
    last to the first.
    """
    watched = [metric.name for metric in reversed(CATALOGUE) if metric.watched and not metric.is_family]
    bands = {name: [f"{PREFIX}{name}", f"{PREFIX}{name}/min", f"{PREFIX}{name}/max"] for name in watched}
    return {"windows": {f"{name}, {WINDOW} steps each": ["Margin", band] for name, band in bands.items()}}
