"""An endpoint for Prometheus."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ctpo_megatron.sinks.worker import Happened

_NUMBERED = re.compile(r"(?P<name>.+)/(?P<label>[a-z_]+)_(?P<number>\d+)")


class Sink(Collector):
    """The last value of every metric. `train/loss` is `ctpo_train_loss`; `servers/queue/server_3` is `ctpo_servers_queue` with
    the label `server="3"`, and so it is with layers, positions and deciles.

    Of events it tells how often each has happened since this process began: `ctpo_events_total` with the label `event`.
    """

    def __init__(self, settings: dict[str, Any], run: dict[str, Any], name: str, *, resumed: bool, metrics: Any) -> None:
        self.id = name
        self._run, self._meanings = run["name"], [(re.compile(pattern), words) for pattern, words in metrics]
        self._last: dict[str, float] = {}
        self._events: Counter[str] = Counter()
        self._changing = threading.Lock()  # it is asked by a thread of the endpoint
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(settings["port"], settings["host"], registry)

    def step(self, step: int, at: float, samples: float | None, metrics: dict[str, float]) -> None:
        """See `worker.Sink`."""
        with self._changing:
            self._last |= {**metrics, "progress/step": float(step), "progress/time": at}

    def phase(self, name: str, step: int, began: float, seconds: float) -> None:
        """See `worker.Sink`."""

    def event(self, happened: Happened) -> None:
        """See `worker.Sink`."""
        with self._changing:
            self._events[happened.name] += 1

    def flush(self) -> None:
        """See `worker.Sink`."""

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Yields all metrics, as prometheus_client asks for them."""
        with self._changing:
            last, events = dict(self._last), dict(self._events)
        counted = CounterMetricFamily(
            "ctpo_events", "How often each event of events.jsonl has happened.", labels=["run", "event"]
        )
        for name, count in sorted(events.items()):
            counted.add_metric([self._run, name], count)
        yield counted
        families: dict[str, GaugeMetricFamily] = {}
        for name, value in sorted(last.items()):
            found = _NUMBERED.fullmatch(name)
            base, label = (found["name"], found["label"]) if found else (name, "")
            key = "ctpo_" + re.sub(r"\W", "_", base) + (f"_by_{label}" if found and base in last else "")
            labels = ["run", label] if found else ["run"]
            family = families.setdefault(key, GaugeMetricFamily(key, self._meaning(name), labels=labels))
            family.add_metric([self._run, found["number"]] if found else [self._run], value)
        yield from families.values()

    def close(self, *, how: str) -> None:
        """See `worker.Sink`."""
        self._server.shutdown()

    def _meaning(self, name: str) -> str:
        return next((words for pattern, words in self._meanings if pattern.fullmatch(name)), name)
