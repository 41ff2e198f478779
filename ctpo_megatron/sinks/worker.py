"""The process of a sink: `python -m ctpo_megatron.sinks.worker TYPE`.

Reads JSON lines from stdin. The first has `settings` (of the configuration), `run` (name, dir, settings), `resumed` and `metrics`
(what each means). Then come, in the order in which they happened,

    {"step": 3, "at": ..., "samples": 96, "metrics": {...}}
    {"phase": "train", "step": 3, "began": ..., "seconds": ...}
    {"event": "server lost", "at": ..., "sentence": ..., "fields": {...}}

and in the end `{"end": true}`: without it the run was killed. What goes wrong is on stderr, and ends it.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

LAST_S = 60  # seconds to end in when stdin has ended: of a run that was killed nothing may stay
FLUSH_S = 30.0  # what a sink gathers waits no longer
AHEAD = 64  # lines that are read before their turn
TYPES = ("wandb", "mlflow", "prometheus", "otel")
# what packages would tell their makers, unless the user says otherwise
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "DO_NOT_TRACK": "1"}
ENDED = "incarnation ended"  # the event that says how


@dataclass(frozen=True, slots=True)
class Happened:
    """Something that happened in the run: an event's name, its sentence and its fields, as JSON values."""

    name: str
    at: float  # seconds since 1970
    sentence: str
    fields: dict[str, Any]

    @property
    def when(self) -> str:
        """Returns the time for a person."""
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.at))


class Sink(Protocol):
    """What takes a run's numbers. Made as `Sink(settings, run, name, resumed=..., metrics=...)`; `id`: what it calls the run,
    `name` where it takes that."""

    id: str

    def step(self, step: int, at: float, samples: float | None, metrics: dict[str, float]) -> None:
        """Take the metrics of a step; `at`: seconds since 1970."""
        ...

    def phase(self, name: str, step: int, began: float, seconds: float) -> None:
        """Take a phase of a step."""
        ...

    def event(self, happened: Happened) -> None:
        """Take what happened. It may be kept until `flush`."""
        ...

    def flush(self) -> None:
        """Bring what was kept on its way. It comes within FLUSH_S, and before `close`."""
        ...

    def close(self, *, how: str) -> None:
        """Bring all on its way. `how` the run's process ended: done, stopped (in order), cancelled, failed or killed."""
        ...


def run_id(run_dir: str, kind: str, *, resumed: bool) -> tuple[str, bool]:
    """Returns the name under which the sink knows the run, and whether it is the one that was kept in RUN_DIR/sinks."""
    path = Path(run_dir) / "sinks" / f"{kind}.json"
    if resumed and path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"]), True
    return uuid.uuid4().hex[:12], False


def keep_id(run_dir: str, kind: str, name: str) -> None:
    """Keep the name under which the sink knows the run, for when it is resumed."""
    path = Path(run_dir) / "sinks" / f"{kind}.json"
    path.parent.mkdir(exist_ok=True)  # not the run's own directory, which may be away
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"id": name}) + "\n", encoding="utf-8")
    part.replace(path)


def feed(sink: Sink, line: dict[str, Any]) -> None:
    """Give one line to the sink."""
    if "phase" in line:
        sink.phase(line["phase"], line["step"], line["began"], line["seconds"])
    elif "event" in line:
        sink.event(Happened(line["event"], line["at"], line["sentence"], line["fields"]))
    else:
        sink.step(line["step"], line["at"], line["samples"], line["metrics"])


def feed_all(sink: Sink, lines: queue.Queue[str | None]) -> str:
    """Give all lines to the sink, up to the last one or None; returns how the run's process ended."""
    how, flushed = "", time.monotonic()
    while True:
        try:
            text = lines.get(timeout=max(0.0, flushed + FLUSH_S - time.monotonic()))
        except queue.Empty:
            sink.flush()
            flushed = time.monotonic()
            continue
        if text is None:
            return "killed"
        line = json.loads(text)
        if "end" in line:
            return how or "done"  # a command without incarnations says nothing else
        if line.get("event") == ENDED:
            how = line["fields"]["how"]
        feed(sink, line)


def main(kind: str) -> None:
    """Feed the sink `kind` from stdin, to its end."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    first = json.loads(sys.stdin.readline())
    name, known = run_id(first["run"]["dir"], kind, resumed=first["resumed"])
    module = importlib.import_module(f"ctpo_megatron.sinks.to_{kind}")
    sink: Sink = module.Sink(first["settings"], first["run"], name, resumed=known, metrics=first["metrics"])
    keep_id(first["run"]["dir"], kind, sink.id)
    lines: queue.Queue[str | None] = queue.Queue(AHEAD)

    def read() -> None:
        for text in sys.stdin:
            lines.put(text)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    how = feed_all(sink, lines)
    signal.alarm(LAST_S)
    sink.flush()
    sink.close(how=how)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in TYPES:
        main(sys.argv[1])
        sys.stdout.flush()
        os._exit(0)  # whatever a package would still wait for: what was given to it is on its way
    sys.exit(f"needed: one of {', '.join(TYPES)}")
