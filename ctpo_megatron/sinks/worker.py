"""The process of a sink: `python -m ctpo_megatron.sinks.worker TYPE`.

Reads JSON lines from stdin. The first has `settings` (of the configuration), `run` (name, dir, settings), `resumed` and `metrics`
(what each means). Then come `{"step": 3, "at": ..., "samples": 96, "metrics": {...}}` and `{"phase": "train", "step": 3, "began":
..., "seconds": ...}`, and in the end `{"end": true}`: without it the run was killed. What goes wrong is on stderr, and ends it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any, Protocol

LAST_S = 60  # seconds to end in when stdin has ended: of a run that was killed nothing may stay
TYPES = ("wandb", "mlflow", "prometheus", "otel")
# what packages would tell their makers, unless the user says otherwise
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "DO_NOT_TRACK": "1"}


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

    def close(self, *, ended: bool) -> None:
        """Bring all on its way. `ended`: by the run itself; otherwise it was killed."""
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
    else:
        sink.step(line["step"], line["at"], line["samples"], line["metrics"])


def main(kind: str) -> None:
    """Feed the sink `kind` from stdin, to its end."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    first = json.loads(sys.stdin.readline())
    name, known = run_id(first["run"]["dir"], kind, resumed=first["resumed"])
    module = importlib.import_module(f"ctpo_megatron.sinks.to_{kind}")
    sink: Sink = module.Sink(first["settings"], first["run"], name, resumed=known, metrics=first["metrics"])
    keep_id(first["run"]["dir"], kind, sink.id)
    ended = False
    for text in sys.stdin:
        line = json.loads(text)
        if "end" in line:
            ended = True
            break
        feed(sink, line)
    signal.alarm(LAST_S)
    sink.close(ended=ended)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in TYPES:
        main(sys.argv[1])
        sys.stdout.flush()
        os._exit(0)  # whatever a package would still wait for: what was given to it is on its way
    sys.exit(f"needed: one of {', '.join(TYPES)}")
