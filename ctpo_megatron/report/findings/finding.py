"""One thing that deserves a look, and how series are looked at to find it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ctpo_megatron.report.reading.metrics import Metrics, Point

FEWEST = 6  # points of a series below which its course says nothing


@dataclass(frozen=True, slots=True)
class Finding:
    """`weight`: 0 to 100, how much it deserves a look; 0 to 9: it is well. `evidence`: the id of a section or figure.

    `detail` says what to do where something can be done.
    """

    weight: float
    title: str
    detail: str
    evidence: str

    @property
    def level(self) -> str:
        """Returns bad, odd or well."""
        return "bad" if self.weight >= 60 else "odd" if self.weight >= 10 else "well"


def ends(points: Sequence[Point], share: float = 0.2) -> tuple[float, float] | None:
    """Returns the means of the first and of the last fifth of a series; None where it has fewer than FEWEST points."""
    if len(points) < FEWEST:
        return None
    size = max(1, round(len(points) * share))
    values = [value for _, value in points]
    return fmean(values[:size]), fmean(values[-size:])


def late(metrics: Metrics, name: str) -> float | None:
    """Returns the mean of a metric's last fifth, None where it has no value."""
    values = [value for _, value in metrics.series(name)]
    return fmean(values[-max(1, len(values) // 5) :]) if values else None


def scaled(value: float, low: float, high: float, weights: tuple[float, float]) -> float:
    """Returns a weight between two, as `value` lies between `low` and `high`."""
    place = min(1.0, max(0.0, (value - low) / (high - low)))
    return weights[0] + place * (weights[1] - weights[0])
