"""What a process did and when, for a trace of one step: spans on tracks.

Nothing of this is there while no step is traced: whoever traces puts itself around methods (`around`), and takes itself off.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ctpo_megatron.record.heartbeat import OpenStage, Stages

MOST = 200_000  # spans of one process in one trace
MAIN = "calls"

Details = dict[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class Span:
    """Something with a beginning and an end, nanoseconds of the process's monotonic clock. `cut`: it went on beyond its end."""

    track: str
    name: str
    begin: int
    end: int
    details: Details = field(default_factory=dict)
    cut: bool = False


@dataclass(frozen=True, slots=True)
class OpenSpan:
    """One that has not ended. `details` may be added to."""

    number: int
    span: Span

    @property
    def details(self) -> Details:
        """What is known of it."""
        return self.span.details


class Spans:
    """Gathers the spans of a process. Safe to use from all threads."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns, most: int = MOST) -> None:
        self._clock, self._most = clock, most
        self._done: list[Span] = []
        self._open: dict[int, Span] = {}
        self._numbers = itertools.count()
        self.left_out = 0  # beyond `most`

    def begin(self, name: str, track: str = MAIN, **details: str | int | float | bool) -> OpenSpan:
        """Returns a span that begins now; `end` ends it."""
        now = self._clock()
        opened = OpenSpan(next(self._numbers), Span(track, name, now, now, details))
        self._open[opened.number] = opened.span
        return opened

    def end(self, opened: OpenSpan) -> None:
        """End a span. Safe to call twice."""
        if self._open.pop(opened.number, None) is None:
            return
        if len(self._done) >= self._most:
            self.left_out += 1
        else:
            self._done.append(replace(opened.span, end=self._clock()))

    @contextlib.contextmanager
    def __call__(self, name: str, track: str = MAIN, **details: str | int | float | bool) -> Iterator[OpenSpan]:
        """A context that is a span."""
        opened = self.begin(name, track, **details)
        try:
            yield opened
        finally:
            self.end(opened)

    def between(self, begin: int, end: int) -> list[Span]:
        """Returns what lies in a stretch of time, in part at least; what has not ended is cut where the stretch ends."""
        still = [replace(each, end=end, cut=True) for each in list(self._open.values())]
        return [each for each in (*self._done, *still) if each.begin <= end and each.end >= begin]

    def forget(self, before: int) -> None:
        """Let go of what ended before a time."""
        self._done = [each for each in self._done if each.end >= before]


def around(owner: Any, method: str, spans: Spans, name: str, track: str = MAIN) -> Callable[[], None]:
    """Let each call of `owner.method` be a span. Returns what takes that off again. `owner`: an object or a class."""
    inner = getattr(owner, method)

    if inspect.iscoroutinefunction(inner):

        @functools.wraps(inner)
        async def spanned(*args: Any, **kwargs: Any) -> Any:
            with spans(name, track):
                return await inner(*args, **kwargs)

    else:

        @functools.wraps(inner)
        def spanned(*args: Any, **kwargs: Any) -> Any:
            with spans(name, track):
                return inner(*args, **kwargs)

    return replaced(owner, method, spanned)


def replaced(owner: Any, method: str, by: Callable[..., Any]) -> Callable[[], None]:
    """Put `by` in the place of `owner.method`. Returns what puts back what was there."""
    own = method in vars(owner)
    before = vars(owner)[method] if own else None
    setattr(owner, method, by)

    def put_back() -> None:
        if own:
            setattr(owner, method, before)
        else:
            delattr(owner, method)

    return put_back


def follow(stages: Stages, spans: Spans) -> Callable[[], None]:
    """Let each stage that is entered from now on be a span. Returns what ends that."""
    enter, leave, opened = stages.enter, stages.leave, dict[int, OpenSpan]()

    def entered(name: str, *, step: int | None = None, detail: str = "", waits_for: str = "") -> OpenStage:
        stage = enter(name, step=step, detail=detail, waits_for=waits_for)
        opened[id(stage)] = spans.begin(name, MAIN, **({} if step is None else {"step": step}))
        return stage

    def left(stage: OpenStage) -> None:
        leave(stage)
        span = opened.pop(id(stage), None)
        if span is not None:
            if stage.detail:
                span.details["detail"] = stage.detail
            spans.end(span)

    ends = [replaced(stages, "enter", entered), replaced(stages, "leave", left)]

    def end() -> None:
        for each in ends:
            each()

    return end
