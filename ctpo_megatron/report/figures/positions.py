"""The health panel: what becomes of log-ratios, clipping and drift along a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt

from ctpo_megatron.report.figures.figure import Figure, height, rows


@dataclass(frozen=True, slots=True)
class Place:
    """A number at a place of trajectories: the mean over the steps of a window. `t`: tokens, from 1, or the decile, from 0."""

    window: str
    t: float
    value: float
    fit: float | None = None


_T = alt.X(
    "t:Q",
    title="t, token of the policy in its trajectory",
    scale=alt.Scale(type="log"),
    axis=alt.Axis(format=",.0f", tickCount=6),
)


def spread(places: Sequence[Place]) -> Figure | None:
    """Returns the standard deviation of S_t over t as dots, with the fitted law as lines; None where nothing has moved."""
    moved = [each for each in places if each.value > 0 and each.fit]
    if not moved:
        return None
    data = rows({"window": each.window, "t": each.t, "std": each.value, "fit": each.fit} for each in moved)
    base = alt.Chart(data).encode(x=_T, color=alt.Color("window:N", sort=None))
    y = alt.Scale(type="log")
    tips = ["window:N", alt.Tooltip("t:Q", format=",.1f"), alt.Tooltip("std:Q", format=".4f"), alt.Tooltip("fit:Q", format=".4f")]
    axis = alt.Axis(format="~g", tickCount=5)
    line = base.mark_line(strokeDash=[5, 3], strokeWidth=1.5).encode(
        y=alt.Y("fit:Q", title="std of S_t, nats", scale=y, axis=axis)
    )
    dots = base.mark_point(filled=True, size=60, opacity=1).encode(
        y=alt.Y("std:Q", title="std of S_t, nats", scale=y, axis=axis), tooltip=tips
    )
    last = [each for each in moved if each.window == moved[-1].window]
    words = f"{last[-1].window}: from {last[0].value:.3g} at t = {last[0].t:.0f} to {last[-1].value:.3g} at t = {last[-1].t:.0f}"
    note = "Dots are measured, dashed lines the law σ √t fitted to them. Dots above the line at large t: late tokens move more."
    return Figure("spread", "Spread of the log-ratio against t", words, height(alt.layer(line, dots)), note)


def deciles(places: Sequence[Place]) -> Figure | None:
    """Returns the share of clipped tokens by tenths of a trajectory."""
    if not places:
        return None
    data = rows({"window": each.window, "decile": int(each.t) + 1, "clipped": each.value} for each in places)
    chart = (
        alt.Chart(data)
        .mark_line(point=alt.OverlayMarkDef(size=50), strokeWidth=1.8)
        .encode(
            x=alt.X("decile:O", title="tenth of the trajectory", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("clipped:Q", title="clipped tokens", axis=alt.Axis(format=".3~p"), scale=alt.Scale(zero=True)),
            color=alt.Color("window:N", sort=None),
            tooltip=["window:N", "decile:O", alt.Tooltip("clipped:Q", format=".2%")],
        )
    )
    last = [each for each in places if each.window == places[-1].window]
    words = f"{last[-1].window}: {last[0].value:.1%} at the beginning of trajectories, {last[-1].value:.1%} at their end"
    note = "Flat is healthy: bounds that grow with √t clip alike at every position."
    return Figure("clip", "Clip fraction by decile", words, height(chart), note)


def drift(places: Sequence[Place]) -> Figure | None:
    """Returns the distance of the trainer's and the engine's log-probs over t."""
    known = [each for each in places if each.value > 0]
    if not known:
        return None
    chart = (
        alt.Chart(rows({"window": each.window, "t": each.t, "drift": each.value} for each in known))
        .mark_line(point=alt.OverlayMarkDef(size=50), strokeWidth=1.8)
        .encode(
            x=_T,
            y=alt.Y(
                "drift:Q", title="mean |Δ log-prob|, nats", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e", tickCount=5)
            ),
            color=alt.Color("window:N", sort=None),
            tooltip=["window:N", alt.Tooltip("t:Q", format=",.0f"), alt.Tooltip("drift:Q", format=".2e")],
        )
    )
    last = [each for each in known if each.window == known[-1].window]
    words = f"{last[-1].window}: {last[0].value:.2g} nats at t = {last[0].t:.0f}, {last[-1].value:.2g} at t = {last[-1].t:.0f}"
    note = "Flat is healthy: every token's log-prob is as exact as the first one's."
    return Figure("drift", "Drift of trainer and engine against t", words, height(chart), note)
