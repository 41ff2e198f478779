"""Steps and their phases, and what each kind of process does meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from ctpo_megatron.record.events import StepTrained
from ctpo_megatron.record.story import Happened
from ctpo_megatron.report.figures import times
from ctpo_megatron.report.figures.times import BUBBLE, Span
from ctpo_megatron.report.parts.part import Part, part
from ctpo_megatron.report.parts.processes import OF_KIND, RECENT, SERVERS, TRAINER, chosen, of_each, shares
from ctpo_megatron.report.reading.lines import number
from ctpo_megatron.report.reading.metrics import Point
from ctpo_megatron.report.reading.run import Run

SHOWN = 8  # steps of the timeline, the last ones
DRIVER = "driver"
PROCESSES = (DRIVER, TRAINER, SERVERS)
TAIL = "rollout tail"
# what each kind of process does in a phase; who is not named waits
WORK: dict[str, dict[str, str]] = {
    "rollout": {SERVERS: "rollout"},
    TAIL: {SERVERS: TAIL},  # few of the attempts are left: most of what the servers could do is idle
    "batch": {DRIVER: "batch"},
    "sleep": {SERVERS: "give memory back"},
    "train": {TRAINER: "train"},
    "publish": {TRAINER: "publish", SERVERS: "publish"},
    "evaluate": {SERVERS: "evaluate"},
    "measure": {TRAINER: "measure"},
    "checkpoint": {TRAINER: "checkpoint"},
    "storage": {},
}
AHEAD = ("batch", "train", "checkpoint")  # in which servers sample for later steps, where rollouts may run ahead


def phases(run: Run, prefix: str) -> Part:
    """Returns the timeline of the last steps, all steps' seconds by phase, and the share of bubbles in each process's time."""
    steps = [each for each in run.happened(StepTrained.name) if number(each.fields.get("seconds"))]
    ahead = bool(number(run.setting("train.staleness")))
    spans = [span for each in steps for span in spans_of(each, ahead=ahead)]
    shown = {number(each.fields.get("step")) for each in steps[-SHOWN:]}
    bubbles = {process: _waits([each for each in spans if each.process == process]) for process in PROCESSES}
    recent = {number(each.fields.get("step")) for each in steps[-RECENT:]}
    own = of_each(run.metrics, [each for each in spans if each.step in recent])
    waits = shares(own)
    extremes = chosen(waits)
    drawn = [DRIVER]
    for kind, (word, _) in OF_KIND.items():
        drawn += [name for name in extremes if name.startswith(f"{word} ")] or [kind]
    last = [each for each in chain(spans, *own.values()) if each.process in drawn and each.step in shown]
    seconds = _seconds(run)
    numbers = {
        "bubbles": bubbles,
        "bubbles_by_process": waits,
        "rollouts_run_ahead": ahead,
        "seconds": {phase: sum(value for _, value in points) for phase, points in seconds.items()},
    }
    figures = [
        times.timeline(_within_one_incarnation(last, drawn), drawn),
        times.waits({name: waits[name] for name in extremes}),
        times.phases(seconds),
    ]
    return part("phases", "Phases and bubbles", prefix=prefix, figures=figures, numbers=numbers)


def spans_of(step: Happened, *, ahead: bool) -> list[Span]:
    """Returns what each kind of process did in a step that ended with its event, in its phases one after another.

    `ahead`: servers sample for later steps while the trainer trains.
    """
    end, number_of = step.time, int(number(step.fields.get("step")) or 0)
    begin = end - (number(step.fields.get("seconds")) or 0.0)
    found, at = list[Span](), begin
    for phase, seconds in _parts(step.fields):
        until = min(at + seconds, end)
        doing = dict(WORK.get(phase, {DRIVER: phase}))
        if ahead and phase in AHEAD:
            doing[SERVERS] = "rollout"
        found += [Span(process, doing.get(process, BUBBLE), at, until, number_of) for process in PROCESSES if until > at]
        at = until
    if end - at > 1e-3:
        found += [Span(process, "other" if process == DRIVER else BUBBLE, at, end, number_of) for process in PROCESSES]
    return found


def _parts(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the phases of a step with their seconds, the tail of the rollout by itself."""
    given = fields.get("phases")
    for phase, value in given.items() if isinstance(given, Mapping) else ():
        seconds = max(number(value) or 0.0, 0.0)
        tail = min(seconds, max(number(fields.get("rollout_tail")) or 0.0, 0.0)) if phase == "rollout" else 0.0
        yield phase, seconds - tail
        if tail:
            yield TAIL, tail


def _within_one_incarnation(spans: list[Span], processes: list[str]) -> list[Span]:
    """Returns the last of `spans` between which the run did not stand still: a gap of a minute would hide all else."""
    spans = sorted(spans, key=lambda each: (each.begin, processes.index(each.process)))
    begin, end = 0, spans[0].end if spans else 0.0
    for place, span in enumerate(spans):
        if span.begin - end > 60.0:
            begin = place
        end = max(end, span.end)
    start = spans[begin].begin if spans else 0.0
    return [Span(each.process, each.doing, each.begin - start, each.end - start, each.step) for each in spans[begin:]]


def _waits(spans: list[Span]) -> float | None:
    whole = sum(each.end - each.begin for each in spans)
    return sum(each.end - each.begin for each in spans if each.doing == BUBBLE) / whole if whole else None


def _seconds(run: Run) -> dict[str, list[Point]]:
    names = ("rollout", "batch", "sleep", "train", "publish", "checkpoint", "eval_stood_still")
    found = {name.replace("eval_stood_still", "evaluate"): run.metrics.series(f"time/{name}") for name in names}
    return {name: points for name, points in found.items() if sum(value for _, value in points) > 0.05}
