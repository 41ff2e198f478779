"""Where time goes: phases of steps, what each kind of process does in them, and goodput."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import altair as alt

from ctpo_megatron.record.goodput import Cause, Goodput
from ctpo_megatron.report.figures.figure import Figure, height, rows
from ctpo_megatron.report.reading.metrics import Point, thinned

BUBBLE = "waits"  # what a process does in a bubble


@dataclass(frozen=True, slots=True)
class Span:
    """What a kind of process does for a while; seconds since the first of the spans."""

    process: str
    doing: str
    begin: float
    end: float
    step: int


def timeline(spans: Sequence[Span], processes: Sequence[str]) -> Figure | None:
    """Returns what `processes` do over some steps, each in a row; bubbles are grey."""
    if not spans:
        return None
    kinds = [*dict.fromkeys(each.doing for each in spans if each.doing != BUBBLE), BUBBLE]
    data = rows(
        {"process": each.process, "doing": each.doing, "begin": each.begin, "end": each.end, "step": each.step} for each in spans
    )
    order = alt.Scale(domain=kinds, range=_colours(kinds))
    seconds = [alt.Tooltip("begin:Q", format=",.2f"), alt.Tooltip("end:Q", format=",.2f")]
    chart = (
        alt.Chart(data)
        .mark_bar(height=alt.RelativeBandSize(0.8))
        .encode(
            x=alt.X("begin:Q", title="seconds", scale=alt.Scale(nice=False)),
            x2="end:Q",
            y=alt.Y("process:N", title=None, sort=list(processes)),
            color=alt.Color("doing:N", scale=order, sort=None),
            opacity=alt.condition(alt.datum.doing == BUBBLE, alt.value(0.35), alt.value(1.0)),
            tooltip=["process:N", "doing:N", "step:Q", *seconds],
        )
    )
    first, last = spans[0].step, spans[-1].step
    words = f"steps {first} to {last}, {max(each.end for each in spans):.1f} seconds"
    note = (
        "From the phases that the driver measures; grey is waiting. How long a rank or a server waited within a phase is known, "
        "and drawn at the phase's end; when that was, a trace tells (`trace.steps`)."
    )
    return Figure("timeline", "What the processes do, and their bubbles", words, height(chart, 34 * len(processes) + 30), note)


def waits(shares: Mapping[str, float]) -> Figure | None:
    """Returns for what share of their time processes wait, each in a row; None where no process has a measure of its own."""
    if not shares:
        return None
    values = rows({"process": name, "waits": share} for name, share in shares.items())
    chart = (
        alt.Chart(values)
        .mark_bar(color=_DOING[BUBBLE])
        .encode(
            x=alt.X("waits:Q", title="share of the steps' time", axis=alt.Axis(format=".0%"), scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("process:N", title=None, sort=list(shares)),
            tooltip=["process:N", alt.Tooltip("waits:Q", format=".1%")],
        )
    )
    most, least = max(shares, key=lambda name: shares[name]), min(shares, key=lambda name: shares[name])
    words = f"{most} waits most, {shares[most]:.1%}, and {least} least, {shares[least]:.1%}"
    note = (
        "A rank waits while it has no part in a phase, and for others in its updates; a server while it has nothing to generate."
    )
    return Figure("waits", "How long each process waits", words, height(chart, 20 * len(shares) + 30), note)


def _colours(kinds: Iterable[str]) -> list[str]:
    """Each kind's colour, the same in all charts; what is none of these is brown."""
    return [_DOING.get(each, "#b5651d") for each in kinds]


_DOING = {
    "rollout": "#0072B2",
    "rollout tail": "#56B4E9",
    "train": "#009E73",
    "publish": "#8c5fbf",
    "evaluate": "#CC79A7",
    "checkpoint": "#7fb069",
    "batch": "#D55E00",
    "sleep": "#C9A400",
    "give memory back": "#C9A400",
    "storage": "#7a1f1f",
    "other": "#6b7280",
    BUBBLE: "#9aa0a8",
}


def phases(seconds: Mapping[str, Sequence[Point]]) -> Figure | None:
    """Returns each step's seconds by phase, one on the other; a phase that a step did not have took it no time."""
    there = [phase for phase, points in seconds.items() if points]
    if not there:
        return None
    steps = sorted({step for points in seconds.values() for step, _ in points})
    of_phase = {phase: dict(seconds[phase]) for phase in there}
    values = [
        {"step": each.step, "seconds": each.mean, "phase": phase}
        for phase, known in of_phase.items()
        for each in thinned([(step, known.get(step, 0.0)) for step in steps], 200)
    ]
    chart = (
        alt.Chart(rows(values))
        .mark_area(interpolate="step-after")
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, format=",.0f", labelSeparation=8)),
            y=alt.Y("seconds:Q", title="seconds of a step", stack="zero"),
            color=alt.Color("phase:N", sort=None, scale=alt.Scale(domain=there, range=_colours(there))),
            tooltip=[alt.Tooltip("step:Q", format=",.0f"), "phase:N", alt.Tooltip("seconds:Q", format=",.3~f")],
        )
    )
    means = {phase: sum(value for _, value in points) / len(points) for phase, points in seconds.items() if points}
    words = ", ".join(f"{phase} {mean:.3g} s" for phase, mean in means.items())
    return Figure("step_seconds", "Seconds of a step by phase", f"in the mean: {words}", height(chart))


def goodput(measured: Goodput) -> Figure:
    """Returns each incarnation's time by cause, and that of all with the waiting between."""
    accounts = [(f"incarnation {number}", each) for number, each in measured.incarnations.items()]
    if len(accounts) > 12:
        accounts = accounts[-12:]
    if len(measured.incarnations) > 1:
        accounts = [("all", measured.total), *accounts]
    causes = [cause for cause in Cause if any(account.milliseconds.get(cause) for _, account in accounts)]
    values = [
        {"who": who, "cause": str(cause), "share": account.shares(allocated=False)[cause], "seconds": account.seconds[cause]}
        for who, account in accounts
        for cause in causes
    ]
    chart = (
        alt.Chart(rows(values))
        .mark_bar()
        .encode(
            x=alt.X(
                "share:Q", title="share of the time", axis=alt.Axis(format=".0%"), stack="zero", scale=alt.Scale(domainMax=1)
            ),
            y=alt.Y("who:N", title=None, sort=None),
            color=alt.Color(
                "cause:N",
                sort=None,
                scale=alt.Scale(domain=[str(each) for each in causes], range=[_CAUSE[each] for each in causes]),
            ),
            order=alt.Order("place:Q"),
            tooltip=["who:N", "cause:N", alt.Tooltip("seconds:Q", format=",.1f"), alt.Tooltip("share:Q", format=".1%")],
        )
        .transform_calculate(place=f"indexof({[str(each) for each in causes]!r}, datum.cause)")
    )
    words = f"goodput {measured.total.goodput:.1%}, " + ", ".join(
        f"{cause} {share:.0%}" for cause, share in measured.total.shares(allocated=False).items() if share >= 0.01
    )
    return Figure("time_by_cause", "Where the time went", words, height(chart, 34 * len(accounts) + 10))


_CAUSE = {
    Cause.ROLLOUT: "#0072B2",
    Cause.TAIL: "#56B4E9",
    Cause.TRAIN: "#009E73",
    Cause.PUBLISH: "#8c5fbf",
    Cause.EVALUATE: "#CC79A7",
    Cause.CHECKPOINT: "#7fb069",
    Cause.OTHER: "#9aa0a8",
    Cause.STALL: "#7a1f1f",
    Cause.LOST: "#D55E00",
    Cause.START: "#C9A400",
    Cause.RESTART: "#E69F00",
    Cause.STOP: "#b5a642",
    Cause.WAIT: "#6b7280",
}
