"""A sink, fed through a pipe: its package, its network and its faults are in a process of its own.

    step ──► queue, 2,000 pieces ──► thread ──► pipe ──► process: `ctpo_megatron.sinks.worker`
             full: dropped, counted              ended: begun again after five minutes; what came meanwhile is lost, and counted

A process that outlives the run's sees its pipe closed, brings what it has on its way and ends, within a minute.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from ctpo_megatron.config.sinks import AnySink, OtelSink, PrometheusSink, WandbSink
from ctpo_megatron.errors import ConfigError, CtpoError
from ctpo_megatron.record.aside import Aside
from ctpo_megatron.record.catalogue import CATALOGUE
from ctpo_megatron.record.events import Event
from ctpo_megatron.record.files import jsonable
from ctpo_megatron.record.hparams import Setting

MODULE = "ctpo_megatron.sinks.worker"
ROOT = Path(__file__).resolve().parents[2]
EXPORTER = "opentelemetry.exporter.otlp.proto.http"
MOST = 2000  # pieces that wait
AGAIN_S = 300.0  # from the end of a process that failed to the beginning of the next
DRAIN_S = 5.0  # for what waits in the queue, when the run ends
END_S = 10.0  # for the process to bring it on its way then
CHECK_S = 60.0  # for an interpreter to say whether it has a package
_LOOK = "import importlib.util as u, sys; sys.exit(0 if all(u.find_spec(m) for m in sys.argv[1:]) else 3)"


@dataclass(frozen=True, slots=True)
class RunWords:
    """What a sink is told of a run. `settings`: those that matter, dotted key to value."""

    name: str
    run_dir: Path
    settings: Mapping[str, Setting]
    resumed: bool


def check_sinks(sinks: Sequence[AnySink]) -> None:
    """Raise ConfigError where a sink cannot be fed: its package, its key file or its port is missing. Nothing is started."""
    for index, sink in enumerate(sinks):
        where = f"log.sinks[{index}], type {sink.type}"
        modules = [sink.package]
        if isinstance(sink, OtelSink) and sink.endpoint is not None:
            modules.append(EXPORTER)
        missing = [name for name in modules if not _has(sink.python, name, where)]
        if missing:
            pip = "opentelemetry-exporter-otlp-proto-http" if EXPORTER in missing else sink.install
            raise ConfigError(
                f"{where}: {sink.python or 'this environment'} has no package {missing[0]}; "
                f"`{sink.python or sys.executable} -m pip install {pip}`, or name an interpreter that has it in `python`, "
                "or leave the sink out"
            )
        if isinstance(sink, WandbSink) and sink.key_file is not None and not os.access(sink.key_file, os.R_OK):
            raise ConfigError(f"{where}: key_file={sink.key_file} cannot be read; needed: a file with the key and nothing else")
        if isinstance(sink, PrometheusSink):
            _check_port(sink, where)


def _has(python: str | None, module: str, where: str) -> bool:
    if python is None:
        with contextlib.suppress(ModuleNotFoundError):  # of a package above it
            return importlib.util.find_spec(module) is not None
        return False
    try:
        done = subprocess.run([python, "-c", _LOOK, module], capture_output=True, timeout=CHECK_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{where}: python={python} cannot be started: {error}") from error
    return done.returncode == 0


def _check_port(sink: PrometheusSink, where: str) -> None:
    try:
        family = socket.getaddrinfo(sink.host, sink.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((sink.host, sink.port))
    except OSError as error:
        raise ConfigError(f"{where}: cannot listen at {sink.host}:{sink.port}: {error.strerror}; choose another port") from error


class SinkProcess:
    """Feeds one sink. Nothing but `close` waits for it. `most`: pieces that may wait; `again_s`: see AGAIN_S."""

    def __init__(self, settings: AnySink, run: RunWords, *, most: int = MOST, again_s: float = AGAIN_S) -> None:
        self.name = f"the sink {settings.type}"
        self._settings, self._run, self._again_s = settings, run, again_s
        self._log = run.run_dir / "logs" / f"sink_{settings.type}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._resumed = run.resumed
        self._not_before = 0.0
        self._aside = Aside(f"sink {settings.type}", most)

    def step(self, step: int, metrics: Mapping[str, float], samples: float | None, at: float) -> None:
        """Take the metrics of a step, up to which `samples` trajectories were trained on; `at`: seconds since 1970."""
        if not isinstance(self._settings, OtelSink):
            numbers = {name: float(value) for name, value in metrics.items()}
            self._put({"step": step, "at": at, "samples": samples, "metrics": numbers})

    def phase(self, name: str, step: int, began: float, seconds: float) -> None:
        """Take a phase of a step, which `began` at so many seconds since 1970."""
        if isinstance(self._settings, OtelSink):
            self._put({"phase": name, "step": step, "began": began, "seconds": seconds})

    def event(self, event: Event, at: float) -> None:
        """Take what happened at so many seconds since 1970."""
        fields = jsonable(asdict(event))
        self._put({"event": event.name, "at": at, "sentence": event.sentence, "fields": fields})

    def lost(self) -> tuple[int, str]:
        """Returns how many pieces were lost since it was asked last, and why."""
        return self._aside.lost()

    def close(self) -> None:
        """Let the process end, within DRAIN_S and END_S; then it is killed. Safe to call twice."""
        self._aside.close(DRAIN_S)
        process = self._process
        if process is None:
            return
        with contextlib.suppress(OSError, ValueError):
            if self._aside.idle:  # else its thread still writes, to a process that does not read
                _write(process, {"end": True})
                _pipe(process).close()
                process.wait(END_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0)
        if process.poll() is None:
            process.kill()
            process.wait()
        self._process = None

    def _put(self, line: dict[str, Any]) -> None:
        self._aside.put(partial(self._send, line))

    def _send(self, line: dict[str, Any]) -> None:
        """Write a line to the process, which is started where there is none. Raises CtpoError where it does not live."""
        process = self._living()
        try:
            _write(process, line)
        except OSError as error:
            raise self._ended(process) from error

    def _living(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            raise self._ended(self._process)
        if self._process is None:
            if time.monotonic() < self._not_before:
                raise CtpoError(f"its process failed and is started again in a while; see {self._log}")
            self._process = self._start()
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        settings, run = self._settings, self._run
        paths = [path for path in (os.environ.get("PYTHONPATH"), str(ROOT)) if path]
        command = [settings.python or sys.executable, "-m", MODULE, settings.type]
        self._log.parent.mkdir(exist_ok=True)  # not the run's own directory, which may be away
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for the run, which tells it when to end
            )
        self._process = process
        about = {"name": run.name, "dir": str(run.run_dir.resolve()), "settings": dict(run.settings)}
        metrics = [(metric.pattern, f"{metric.meaning} [{metric.unit}]") for metric in CATALOGUE]
        _write(process, {"settings": settings.words(), "run": about, "resumed": self._resumed, "metrics": metrics})
        self._resumed = True  # one that follows it goes on in the same run of the sink
        return process

    def _ended(self, process: subprocess.Popen[bytes]) -> CtpoError:
        """Returns why the process ended, and lets another one begin when it is time."""
        with contextlib.suppress(OSError):
            _pipe(process).close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        process.kill()
        self._process, self._not_before = None, time.monotonic() + self._again_s
        return CtpoError(f"its process ended with code {process.wait()}: {last_words(self._log)}; see {self._log}")


def last_words(log: Path) -> str:
    """Returns the last line of a log file that is not empty."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace")[-4000:].splitlines()]
        return next((line for line in reversed(lines) if line), "")[:200]
    return ""


def _write(process: subprocess.Popen[bytes], line: dict[str, Any]) -> None:
    pipe = _pipe(process)
    pipe.write(json.dumps(line).encode() + b"\n")
    pipe.flush()


def _pipe(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None, "it was asked for"
    return process.stdin
