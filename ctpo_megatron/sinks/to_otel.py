"""OpenTelemetry."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.trace import set_span_in_context

EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
NANOSECONDS = 1e9


class Sink:
    """A trace for each training step: a span of the step, and below it one for each phase, at the times at which they were."""

    def __init__(self, settings: dict[str, Any], run: dict[str, Any], name: str, *, resumed: bool, metrics: Any) -> None:
        self.id = name
        resource = Resource.create({"service.name": "ctpo", "ctpo.run": run["name"], "ctpo.run_id": name})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(_processor(settings["endpoint"], Path(run["dir"]) / "spans.jsonl"))
        self._tracer = self._provider.get_tracer("ctpo")
        self._step: tuple[int, Span] | None = None  # the step that is open
        self._ends = 0  # when its last phase ended

    def step(self, step: int, at: float, samples: float | None, metrics: dict[str, float]) -> None:
        """See `worker.Sink`."""

    def phase(self, name: str, step: int, began: float, seconds: float) -> None:
        """See `worker.Sink`."""
        begins, ends = int(began * NANOSECONDS), int((began + seconds) * NANOSECONDS)
        if self._step is None or self._step[0] != step:
            self._end_step()
            opened: Any = self._tracer.start_span(f"step {step}", start_time=begins, attributes={"ctpo.step": step})
            self._step = (step, opened)
        context = set_span_in_context(self._step[1])
        span = self._tracer.start_span(name, context, start_time=begins, attributes={"ctpo.step": step})
        span.end(ends)
        self._ends = max(self._ends, ends)

    def close(self, *, ended: bool) -> None:
        """See `worker.Sink`."""
        self._end_step()
        self._provider.shutdown()

    def _end_step(self) -> None:
        if self._step is not None:
            self._step[1].end(self._ends)
            self._step, self._ends = None, 0


def _processor(endpoint: str | None, path: Path) -> SpanProcessor:
    if endpoint is not None:
        return BatchSpanProcessor(importlib.import_module(EXPORTER).OTLPSpanExporter(endpoint=endpoint))

    def as_line(span: ReadableSpan) -> str:
        return span.to_json(indent=None) + "\n"

    return SimpleSpanProcessor(ConsoleSpanExporter(out=path.open("a", encoding="utf-8"), formatter=as_line))
