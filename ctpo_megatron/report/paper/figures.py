"""Clip rate against position for an adaptive and a fixed window, spread with the fitted sigma, density by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from ctpo_megatron.errors import InputError
from ctpo_megatron.report.figures import positions
from ctpo_megatron.report.figures.figure import Figure, height, rows
from ctpo_megatron.report.figures.positions import Place
from ctpo_megatron.report.paper.windows import BY_ROOT, TOTAL, Counts, Window, clip_rate, density, read_counts
from ctpo_megatron.report.parts.health import spreads
from ctpo_megatron.report.reading.lines import number
from ctpo_megatron.report.reading.run import Run

FIXED = Window(low=math.log(2.0), high=math.log(5.0), dual=math.log(5.0))  # ratios from 0.5 to 5, as in the paper's figure 1
PAPERS = Window(low=0.025, high=0.05, dual=0.05)  # times sqrt(t): the bounds of its experiments
DENSITIES = 5  # ranges of positions that are shown


def paper_figures(runs: Sequence[Run]) -> dict[str, Figure]:
    """Returns the figures of each run by name. Raises InputError where a run has not recorded what they need."""
    found: dict[str, Figure] = {}
    for place, run in enumerate(runs, start=1):
        begin = "" if len(runs) == 1 else f"run{place}--"
        found |= {f"{begin}{figure.id}": figure for figure in _of(run)}
    return found


def _of(run: Run) -> list[Figure]:
    counts = read_counts(run.ratios)
    if not counts.steps:
        raise InputError(
            f"{run.directory}: there is no ratios.jsonl with a step in it, so how ratios spread by position is not known. "
            "Runs write one every log.ratios_every steps (10 by default, 0: never); this one was shorter, or of a release without"
        )
    made = [clip_by_position(counts, _window(run)), spread_with_sigma(run), density_by_position(counts)]
    return [each for each in made if each is not None]


def _window(run: Run) -> Window:
    """Returns the run's own bounds where it has CTPO's with the square root, else the paper's."""
    objective = run.setting("algorithm.objective")
    if not isinstance(objective, dict) or objective.get("type") != "ctpo" or objective.get("power", 0.5) != 0.5:
        return PAPERS
    low, high = number(objective.get("clip_low")), number(objective.get("clip_high"))
    dual = number(objective.get("dual_clip"))
    return Window(PAPERS.low if low is None else low, PAPERS.high if high is None else high, math.inf if dual is None else dual)


def clip_by_position(counts: Counts, adaptive: Window) -> Figure:
    """Returns the share of clipped tokens over t, for bounds that grow with the root of t and for a fixed window."""
    names = (
        (f"adaptive: −{adaptive.low:g} √t to {adaptive.high:g} √t", BY_ROOT, adaptive),
        ("fixed: ratios from 0.5 to 5", TOTAL, FIXED),
    )
    values = [
        {"t": position * math.sqrt(2), "from": position, "clipped": rate, "window": name}
        for name, kind, window in names
        for position in counts.positions()
        if (rate := clip_rate(counts, kind, window, position)) is not None
    ]
    chart = (
        alt.Chart(rows(values))
        .mark_line(point=alt.OverlayMarkDef(size=50), strokeWidth=2)
        .encode(
            x=_T,
            y=alt.Y("clipped:Q", title="clipped tokens", axis=alt.Axis(format=".3~p"), scale=alt.Scale(zero=True)),
            color=alt.Color("window:N", sort=None),
            tooltip=["window:N", alt.Tooltip("from:Q", title="from token"), alt.Tooltip("clipped:Q", format=".2%")],
        )
    )
    ends: dict[str, list[float]] = {}
    for value in values:
        ends.setdefault(str(value["window"]), []).append(float(str(value["clipped"])))
    words = "; ".join(f"{name}: {rates[0]:.1%} at the first tokens, {rates[-1]:.1%} at the last" for name, rates in ends.items())
    note = f"Of {counts.steps} recorded steps; what each window would clip of the same tokens."
    return Figure("clip_by_position", "Clip rate against position", words, height(chart, 280), note)


_T = alt.X("t:Q", title="t, token of the policy in its trajectory", scale=alt.Scale(type="log"), axis=alt.Axis(format=",.0f"))


def spread_with_sigma(run: Run) -> Figure | None:
    """Returns the spread of the log-ratio over t, the windows of steps named with their fitted sigma."""
    places = spreads(run.metrics)
    sigmas = {each.window: each.fit / math.sqrt(each.t) for each in places if each.fit}
    named = [Place(f"{each.window}, σ = {sigmas[each.window]:.3g}", each.t, each.value, each.fit) for each in places if each.fit]
    figure = positions.spread(named)
    return None if figure is None else Figure("spread_with_sigma", figure.title, figure.says, figure.chart, figure.note)


def density_by_position(counts: Counts) -> Figure:
    """Returns the density of the log-ratio S_t in some ranges of t."""
    known = counts.positions()
    step = max(1, math.ceil(len(known) / DENSITIES))
    values: list[dict[str, Any]] = []
    for position in known[::-1][::step][::-1]:
        name = f"t = {position} to {2 * position - 1}"
        bars = density(counts, position)
        values += [{"log_ratio": (low + high) / 2, "density": share, "t": name} for low, high, share in bars]
    chart = (
        alt.Chart(rows(values))
        .mark_line(strokeWidth=2, interpolate="monotone")
        .encode(
            x=alt.X("log_ratio:Q", title="S_t, log of the ratio of the first t tokens"),
            y=alt.Y("density:Q", title="density, by nat", scale=alt.Scale(type="symlog")),
            color=alt.Color("t:N", sort=None),
            tooltip=["t:N", alt.Tooltip("log_ratio:Q", format=".3f"), alt.Tooltip("density:Q", format=".3f")],
        )
    )
    words = f"in {len({value['t'] for value in values})} ranges of t, wider with every one"
    return Figure("density_by_position", "Density of the log-ratio by position", words, height(chart, 280))
