"""OpenTelemetry."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.trace import set_span_in_context

from ctpo_megatron.sinks.worker import Happened

EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
NANOSECONDS = 1e9
BETWEEN = "outside the steps"
MOST = 1000  # events of a span: a step in which servers fail has hundreds, and 128 would be kept

Attributes = dict[str, str | int | float | bool]


class Sink:
    """A trace for each training step: a span of the step, and below it one for each phase, at the times at which they were.

    Events are those of the step's span. What happens between steps, before the first and behind the last is in spans of its own.
    """

    def __init__(self, settings: dict[str, Any], run: dict[str, Any], name: str, *, resumed: bool, metrics: Any) -> None:
        self.id = name
        resource = Resource.create({"service.name": "ctpo", "ctpo.run": run["name"], "ctpo.run_id": name})
        self._provider = TracerProvider(resource=resource, span_limits=SpanLimits(max_events=MOST))
        self._provider.add_span_processor(_processor(settings["endpoint"], Path(run["dir"]) / "spans.jsonl"))
        self._tracer = self._provider.get_tracer("ctpo")
        self._step: tuple[int, Span] | None = None  # the step that is open
        self._ends = 0  # when its last phase ended
        self._events: list[Happened] = []  # whose span is not known yet: a step is told of when its first phase is over

    def step(self, step: int, at: float, samples: float | None, metrics: dict[str, float]) -> None:
        """See `worker.Sink`."""

    def phase(self, name: str, step: int, began: float, seconds: float) -> None:
        """See `worker.Sink`."""
        begins, ends = _time(began), _time(began + seconds)
        if self._step is None or self._step[0] != step:
            self._end_step()
            self._tell_between(self._taken(before=begins), begins)
            self._step = (step, self._begun(f"step {step}", begins, {"ctpo.step": step}))
        context = set_span_in_context(self._step[1])
        span = self._tracer.start_span(name, context, start_time=begins, attributes={"ctpo.step": step})
        span.end(ends)
        self._ends = max(self._ends, ends)

    def event(self, happened: Happened) -> None:
        """See `worker.Sink`."""
        self._events.append(happened)

    def flush(self) -> None:
        """See `worker.Sink`."""

    def close(self, *, how: str) -> None:
        """See `worker.Sink`."""
        self._end_step()
        last = max((_time(each.at) for each in self._events), default=0)
        self._tell_between(self._taken(), last)
        self._provider.shutdown()

    def _taken(self, before: int | None = None) -> list[Happened]:
        """Returns the events that wait and were before that time, and lets go of them; None: all."""
        taken = [each for each in self._events if before is None or _time(each.at) < before]
        self._events = [each for each in self._events if before is not None and _time(each.at) >= before]
        return taken

    def _end_step(self) -> None:
        if self._step is not None:
            _tell(self._step[1], self._taken(before=self._ends))
            self._step[1].end(self._ends)
            self._step, self._ends = None, 0

    def _tell_between(self, events: list[Happened], until: int) -> None:
        if events:
            span = self._begun(BETWEEN, _time(events[0].at), {})
            _tell(span, events)
            span.end(until)

    def _begun(self, name: str, at: int, attributes: Attributes) -> Span:
        opened: Any = self._tracer.start_span(name, start_time=at, attributes=attributes)
        span: Span = opened
        return span


def _tell(span: Span, events: Iterable[Happened]) -> None:
    for each in events:
        span.add_event(each.name, {"sentence": each.sentence, **_attributes(each.fields)}, _time(each.at))


def _attributes(fields: dict[str, Any]) -> Attributes:
    """An event's fields, as far as they are known; what is no plain value is JSON."""
    known = {name: value for name, value in fields.items() if value is not None}
    return {name: value if isinstance(value, str | int | float) else json.dumps(value) for name, value in known.items()}


def _time(seconds: float) -> int:
    return int(seconds * NANOSECONDS)


def _processor(endpoint: str | None, path: Path) -> SpanProcessor:
    if endpoint is not None:
        return BatchSpanProcessor(importlib.import_module(EXPORTER).OTLPSpanExporter(endpoint=endpoint))

    def as_line(span: ReadableSpan) -> str:
        return span.to_json(indent=None) + "\n"

    return SimpleSpanProcessor(ConsoleSpanExporter(out=path.open("a", encoding="utf-8"), formatter=as_line))
