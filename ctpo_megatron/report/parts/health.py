"""The position health panel: log-ratios, clipping and drift along trajectories, and the effective sample size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from ctpo_megatron.report.figures import positions
from ctpo_megatron.report.figures.curves import curves
from ctpo_megatron.report.figures.positions import Place
from ctpo_megatron.report.parts.part import Part, part
from ctpo_megatron.report.reading.metrics import Metrics
from ctpo_megatron.report.reading.run import Run

WINDOWS = 3  # of a run's steps: its first third, the second, the last
_STD, _FIT = "health/log_ratio_std/from_token_{}", "health/log_ratio_fit/from_token_{}"
_SIGMA = "health/log_ratio_sigma"


def health(run: Run, prefix: str) -> Part:
    """Returns the panel of a run."""
    metrics = run.metrics
    spread, clip, drift = spreads(metrics), over_deciles(metrics), over_positions(metrics, "drift/from_token_{}")
    figures = [
        positions.spread(spread),
        positions.deciles(clip),
        positions.drift(drift),
        curves(
            "sample_size",
            "Effective sample size",
            "share of the tokens",
            {
                "token ratios": metrics.series("health/effective_sample_size"),
                "correction": metrics.series("health/correction_sample_size"),
            },
            note="1: all tokens weigh alike. That of a product of ratios falls with length by nature; its trend is what counts.",
        ),
        curves("sigma", "σ of the fitted law", "nats by √token", {"σ": metrics.series(_SIGMA)}, zero=True),
        curves("growth", "Growth of the spread with t", "exponent", {"b of t^b": metrics.series("health/log_ratio_growth")}),
    ]
    last = {"sigma": metrics.last(_SIGMA), "growth": metrics.last("health/log_ratio_growth")}
    last |= {"effective_sample_size": metrics.last("health/effective_sample_size"), "drift_max": _largest(metrics, "drift/max")}
    numbers = {"last": last, "spread": _rows(spread), "clip_fraction": _rows(clip), "drift": _rows(drift)}
    return part("health", "Position health", prefix=prefix, figures=figures, numbers=numbers, last=last)


def windows(steps: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Returns the steps in WINDOWS stretches of about as many, each with its name; one stretch of fewer steps than that."""
    steps = sorted(steps)
    count = WINDOWS if len(steps) >= 2 * WINDOWS else min(1, len(steps))
    borders = [round(place * len(steps) / count) for place in range(count + 1)] if count else []
    parts = [steps[begin:end] for begin, end in pairwise(borders)]
    return [(f"step {each[0]}" if len(each) == 1 else f"steps {each[0]} to {each[-1]}", each) for each in parts]


def spreads(metrics: Metrics) -> list[Place]:
    """Returns the standard deviation of S_t at the mean t of each range, and the fitted law: quadratic means over each window."""
    found = []
    names = [number for _, number in metrics.names(_STD.format(r"(\d+)"))]
    for name, steps in windows([step for step, _ in metrics.series(_SIGMA)]):
        for number in names:
            rows = [row for step in steps if (row := metrics.rows[step]).get(_STD.format(number)) is not None]
            known = [
                (row[_STD.format(number)], row.get(_FIT.format(number), math.nan), row[_SIGMA]) for row in rows if row[_SIGMA] > 0
            ]
            if known:
                stds, fits, sigmas = zip(*known, strict=True)
                # the law at the mean t of the range is sigma times its root, which tells the mean t
                place = fmean((fit / sigma) ** 2 for fit, sigma in zip(fits, sigmas, strict=True))
                found.append(Place(name, place, _quadratic(stds), _quadratic(fits)))
    return [each for each in found if math.isfinite(each.t) and math.isfinite(each.value)]


def over_deciles(metrics: Metrics) -> list[Place]:
    """Returns the mean share of clipped tokens in each decile, over each window."""
    return _means(metrics, "health/clip_fraction/decile_{}", lambda decile: float(decile))


def over_positions(metrics: Metrics, name: str) -> list[Place]:
    """Returns the means of a metric by ranges of positions, over each window; t is the first of its range."""
    return _means(metrics, name, float)


def _means(metrics: Metrics, name: str, place: Callable[[str], float]) -> list[Place]:
    of = metrics.names(name.format(r"(\d+)"))
    steps = {step for key, _ in of for step, _ in metrics.series(key)}
    found = []
    for window, members in windows(sorted(steps)):
        for key, number in of:
            values = [value for step in members if (value := metrics.rows[step].get(key)) is not None and math.isfinite(value)]
            if values:
                found.append(Place(window, place(number), fmean(values)))
    return found


def _quadratic(values: Sequence[float]) -> float:
    return math.sqrt(fmean(value * value for value in values))


def _largest(metrics: Metrics, name: str) -> float | None:
    return max((value for _, value in metrics.series(name)), default=None)


def _rows(places: Sequence[Place]) -> list[dict[str, Any]]:
    return [{"steps": each.window, "t": each.t, "value": each.value, "fit": each.fit} for each in places]
