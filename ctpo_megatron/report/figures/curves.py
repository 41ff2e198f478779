"""Curves over steps, with bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from ctpo_megatron.report.figures.figure import Figure, height, rows
from ctpo_megatron.report.reading.ledgers import Band
from ctpo_megatron.report.reading.metrics import Point, thinned

LARGE = 10_000  # from which on an axis says 20k


def curves(
    id: str,
    title: str,
    unit: str,
    series: Mapping[str, Sequence[Point]],
    *,
    note: str = "",
    zero: bool = False,
) -> Figure | None:
    """Returns curves by their names, None where no series has a point, or none is ever anything but 0.

    Of a long series many steps are one point; a band then reaches from their smallest to their largest value.
    """
    if all(value == 0 for points in series.values() for _, value in points):
        return None
    values = [
        {"step": each.step, "value": each.mean, "low": each.low, "high": each.high, "of": name}
        for name, points in series.items()
        for each in thinned(list(points))
    ]
    several = sum(1 for points in series.values() if points) > 1
    return Figure(id, title, says(series), _banded(values, unit, zero=zero, several=several), note)


def banded(
    id: str, title: str, unit: str, bands: Mapping[str, Sequence[tuple[int, Band]]], *, note: str = "", dots: bool = False
) -> Figure | None:
    """Returns means over steps with their intervals by name; None where there are none. `dots`: each value is marked."""
    limit = 400
    values: list[dict[str, Any]] = []
    for name, series in bands.items():
        size = max(1, -(-len(series) // limit))
        for begin in range(0, len(series), size):
            part = series[begin : begin + size]
            value: dict[str, Any] = {"step": sum(step for step, _ in part) / len(part), "of": name}
            for key in ("mean", "low", "high"):
                value["value" if key == "mean" else key] = sum(getattr(each, key) for _, each in part) / len(part)
            values.append(value)
    if not values:
        return None
    points = {name: [(step, each.mean) for step, each in series] for name, series in bands.items()}
    return Figure(id, title, says(points), _banded(values, unit, several=len(bands) > 1, dots=dots), note)


def says(series: Mapping[str, Sequence[Point]]) -> str:
    """Returns where each curve begins and ends, in words."""
    parts = []
    for name, points in series.items():
        if points:
            (first, begin), (last, end) = points[0], points[-1]
            parts.append(f"{name}: {begin:.4g} at step {first}, {end:.4g} at step {last}")
    return "; ".join(parts)


def _banded(values: list[dict[str, Any]], unit: str, *, zero: bool = False, several: bool, dots: bool = False) -> alt.LayerChart:
    form = "~s" if max(abs(each["high"]) for each in values) >= LARGE else ",.4~g"
    base = alt.Chart(rows(values)).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, format=",.0f")),
        color=alt.Color("of:N", legend=alt.Legend() if several else None, sort=None),
    )
    scale = alt.Scale(zero=zero, nice=True)
    band = base.mark_area(opacity=0.22).encode(
        y=alt.Y("low:Q", title=unit, scale=scale, axis=alt.Axis(format=form)), y2=alt.Y2("high:Q")
    )
    tips = [alt.Tooltip("step:Q", format=",.0f"), alt.Tooltip("value:Q", title=unit, format=",.5~g"), "low:Q", "high:Q", "of:N"]
    line = base.mark_line(strokeWidth=1.8, point=alt.OverlayMarkDef(size=36) if dots or len(values) < 12 else False).encode(
        y=alt.Y("value:Q", title=unit, scale=scale, axis=alt.Axis(format=form)), tooltip=tips
    )
    return height(alt.layer(band, line))
