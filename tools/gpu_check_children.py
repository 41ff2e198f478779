"""Child processes of tools/gpu_check.py, each with some rows, and a bound on every one of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_check_rows import Place, Result, Row

START_S = 60.0  # for a process to begin its first row
END_S = 10.0  # for a process to end after its last
POLL_S = 0.05
WORKER = Path(__file__).with_name("gpu_check_worker.py")


@dataclass
class Report:
    """All that children told: results in the order in which they came, lines of the package that ran, its files
    that were imported."""

    results: list[Result] = field(default_factory=list)
    reached: set[tuple[str, int]] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)


def run_rows(rows: list[Row], place: Place, report: Report, *, deadline: float, show: Callable[[Result], None]) -> None:
    """Run `rows` in one child, in another where that one ends too soon, and put what they found into `report`.

    `deadline`: of all rows, on the monotonic clock. A row that takes longer than its bound is a fault, and its process is ended;
    the rows behind it run in a new one.
    """

    def add(result: Result) -> None:
        report.results.append(result)
        show(result)

    left = list(rows)
    while left:
        if time.monotonic() >= deadline:
            for row in left:
                add(Result(row.name, "no time was left", row.wanted, "not run"))
            return
        done = _run_child(left, place, report, deadline, add)
        left = left[done:]


def _run_child(rows: list[Row], place: Place, report: Report, deadline: float, add: Callable[[Result], None]) -> int:
    """How many rows one child has dealt with, which is at least one."""
    lines, log = place.folder / f"{rows[0].process}.jsonl", place.folder / f"{rows[0].process}.log"
    lines.write_text("")
    settings = json.dumps(asdict(place) | {"folder": str(place.folder)})
    command = [sys.executable, str(WORKER), str(lines), settings, json.dumps([asdict(row) for row in rows])]
    with log.open("a") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return _follow(child, rows, report, lines, log, deadline, add)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with what it started
        child.wait()


def _follow(
    child: subprocess.Popen[bytes],
    rows: list[Row],
    report: Report,
    lines: Path,
    log: Path,
    deadline: float,
    add: Callable[[Result], None],
) -> int:
    done, until, told = 0, time.monotonic() + START_S, _Lines(lines)
    while True:
        ended = child.poll() is not None  # asked before the lines are read: then none is missed
        for line in told.new():
            if "begun" in line:
                until = time.monotonic() + rows[done].limit_s
            elif "result" in line:
                add(Result(**line["result"]))
                report.reached |= {(file, number) for file, number in line["reached"]}
                done, until = done + 1, time.monotonic() + (END_S if done + 1 == len(rows) else START_S)
            else:
                report.modules |= set(line["modules"])
        if done == len(rows) and (ended or time.monotonic() > until):
            return done
        if ended:
            row = rows[done]
            add(Result(row.name, f"its process ended with code {child.returncode}: {_last_line(log)}", row.wanted, "FAULT"))
            return done + 1
        if done < len(rows) and time.monotonic() > min(until, deadline):
            row, late = rows[done], time.monotonic() > deadline
            said = "no time was left" if late else f"not done after {row.limit_s:.0f} s; its process was ended"
            add(Result(row.name, said, row.wanted, "not run" if late else "FAULT"))
            return done + 1
        time.sleep(POLL_S)


class _Lines:
    """The whole lines of JSON in a file that grows."""

    def __init__(self, file: Path) -> None:
        self._file, self._read = file, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Those that came since this was asked for last."""
        text = self._file.read_bytes()[self._read :]
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            yield json.loads(line)


def _last_line(log: Path) -> str:
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return said[-1] if said else "it said nothing"
