"""RUN_DIR/traces/step_XXXXXXXX.json.gz: one step over all processes of a run, as Perfetto and chrome://tracing read it.

The file is Chrome's trace format: a process with its tracks for each process of the run. Times are whole microseconds since the
first span began, all on the driver's clock: of fractions Perfetto 52 makes nanoseconds by rounding, and it drops spans that do
not nest any more then, or begin before 0. Spans of one track that overlap without one holding the other stand in lanes of their
own.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import storing
from ctpo_megatron.record.spans import MAIN, Span

DIRECTORY = "traces"
CUT = "it went on beyond the trace"


@dataclass(frozen=True, slots=True)
class Clock:
    """What was measured of a process's monotonic clock. `offset`: nanoseconds that it is ahead of the driver's; `error`: of that.

    `same`: both are one clock, that of the host; then both are 0.
    """

    offset: int = 0
    error: int = 0
    same: bool = True


@dataclass(frozen=True, slots=True)
class Traced:
    """The spans of one process, by its own clock. `left_out`: spans that were too many."""

    process: str
    spans: Sequence[Span]
    clock: Clock = Clock()
    left_out: int = 0


def trace_path(run_dir: Path, step: int, suffix: str = ".json.gz") -> Path:
    """Returns the file of a step's trace."""
    return run_dir / DIRECTORY / f"step_{step:08d}{suffix}"


def write_trace(path: Path, step: int, traced: Sequence[Traced]) -> int:
    """Write the trace of a step; returns how many spans it has.

    Raises StorageError.
    """
    begins = (span.begin - each.clock.offset for each in traced for span in each.spans)
    events = list(trace_events(min(begins, default=0), traced))
    clocks = {each.process: asdict(each.clock) for each in traced}
    told = {"step": step, "clocks": clocks, "left_out": {each.process: each.left_out for each in traced if each.left_out}}
    content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": told}
    part = path.with_name(f".{path.name}.part")
    with storing(path):
        path.parent.mkdir(exist_ok=True)  # never the run's own directory, which may be away
        with gzip.open(part, "wt", encoding="utf-8", compresslevel=4) as file:
            file.write(json.dumps(content, separators=(",", ":")))  # at one go: that is C
        os.replace(part, path)
    return sum(event["ph"] == "X" for event in events)


def trace_events(begin: int, traced: Iterable[Traced]) -> Iterator[dict[str, Any]]:
    """Yields the events of the format: names of processes and tracks, then their spans. `begin`: of the first of them."""
    for pid, process in enumerate(traced, 1):
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": process.process}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
        tid = 0
        for track, spans in _by_track(process.spans):
            for lane in lanes(spans):
                tid += 1
                name = "thread_name"
                yield {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": {"name": track}}
                yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
                yield from (_event(pid, tid, span, begin + process.clock.offset) for span in lane)


def _event(pid: int, tid: int, span: Span, begin: int) -> dict[str, Any]:
    details = {**span.details, "cut": CUT} if span.cut else span.details
    first, last = ((at - begin) // 1000 for at in (span.begin, span.end))  # both cut down, so what nests still does
    times = {"ts": first, "dur": last - first}
    return {"ph": "X", "name": span.name, "cat": span.track, "pid": pid, "tid": tid, **times, "args": details}


def _by_track(spans: Iterable[Span]) -> list[tuple[str, list[Span]]]:
    found: dict[str, list[Span]] = {}
    for span in spans:
        found.setdefault(span.track, []).append(span)
    return sorted(found.items(), key=lambda each: (each[0] != MAIN, each[0]))


def lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """Returns the spans in as many lanes as are needed for any two of a lane to lie apart, or one in the other."""
    found: list[list[Span]] = []
    stacks: list[list[Span]] = []  # of each lane the spans that hold the last one, and it
    for span in sorted(spans, key=lambda each: (each.begin, -each.end)):
        for stack in stacks:
            while stack and stack[-1].end <= span.begin:
                stack.pop()
        fits = (index for index, stack in enumerate(stacks) if not stack or stack[-1].end >= span.end)
        place = next(fits, len(found))
        if place == len(found):
            found.append([])
            stacks.append([])
        found[place].append(span)
        stacks[place].append(span)
    return found
