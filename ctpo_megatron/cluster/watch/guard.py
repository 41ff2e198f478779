"""Looks after the driver from outside: `python -I -S guard.py PID FROZEN_S RUN_DIR`, with a byte a second on standard input.

A driver that ends in order kills this process first. Otherwise the end of the input means that the driver has died: what is left
of the run on this host is ended, and then this process ends too. Actors and servers notice the death by themselves within 3 s.
A process that is stopped does not. Neither does Ray's agent for workers' variables, which runs where there are GPUs: it tells a
GCS that is gone of the end, and waits a minute for its answer (Ray 2.60).

It imports the standard library alone: it lives through the whole run.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

STOPPED_S = 10.0
EVERY_S = 1.0
OVERSLEPT_S = 5.0  # of this process: then it was stopped with the driver, or had no processor
DUMP_S = 10.0
GONE_WITHIN_S = 5.0  # a driver whose end of the pipe is closed; one that is still there after that has begun anew
BY_THEMSELVES_S = 5.0  # may what is left take to end, and to tidy up
TIDY_S = 2.0  # the same for what has lost its parent here
END_WITHIN_S = 25.0
LOOK_SHARE = 100.0  # looks at the table of processes take one part in so many of a processor's time
LONGEST_PAUSE_S = 5.0  # between two looks: what came and lost its parent in between is not known


def main(pid: int, frozen_s: float, run_dir: Path) -> None:
    """Watch process `pid` until it ends, then see to it that the processes below it end, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they reach the whole terminal; the driver is still ending its processes
    below = Below(pid)
    watch(pid, frozen_s, run_dir, below)
    deadline = time.monotonic() + GONE_WITHIN_S
    while state_of(pid) not in ("", "Z", "X"):
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)
    below.end(run_dir / "logs" / "guard.log")


def watch(pid: int, frozen_s: float, run_dir: Path, below: Below) -> None:
    """Return when process `pid` has closed its end of standard input, is gone, or was ended here."""
    directory = run_dir / "stalls"
    heard = running = slept = time.monotonic()
    while True:
        ready, _, _ = select.select([0], [], [], EVERY_S)
        now = time.monotonic()
        overslept, slept = now - slept > EVERY_S + OVERSLEPT_S, now
        if ready:
            if not os.read(0, 4096):
                return
            heard = now
        state = state_of(pid)
        if not state:
            return
        below.look()
        if state != "T":
            running = now
        if overslept:
            heard = running = now
        elif now - running > STOPPED_S:
            end(pid, directory, f"The driver is stopped (SIGSTOP) for {now - running:.0f} s")
            return
        elif state != "T" and now - heard > frozen_s + STOPPED_S:  # its own thread comes first, and says more
            end(pid, directory, f"The driver's interpreter is held for {now - heard:.0f} s: no thread of it comes to its turn")
            return


def state_of(pid: int) -> str:
    """The state letter of a process; empty when it is gone. `t`, of a process that a debugger holds, is not T."""
    fields = _fields(pid)
    return fields[0] if fields else ""


def _fields(pid: int) -> list[str]:
    """What the system says of a process behind its name: state, parent's id, ..., and at 19 when it started; nothing: gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


class Below:
    """The processes below process `pid`: all that were seen there once and live, also where their own parent has ended."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._known: dict[int, tuple[int, str]] = {}  # by id: the parent's id, and when it started
        self._next = 0.0

    def look(self, *, now: bool = False) -> None:
        """See which there are. Unless it has to be `now`, only when it would not cost too much, as in a long table."""
        if not now and time.monotonic() < self._next:
            return
        begun = time.process_time()  # not of a clock: on a busy host a look lasts long, and costs no more
        table = {int(name): _fields(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        living = {pid: (int(of[1]), of[19]) for pid, of in table.items() if of and of[0] not in "ZX" and pid != os.getpid()}
        children: dict[int, list[int]] = defaultdict(list)
        for pid, (parent, _) in living.items():
            children[parent].append(pid)
        found = [pid for pid, (_, started) in self._known.items() if pid in living and living[pid][1] == started]
        found += children[self._pid]
        self._known = {}
        while found:
            pid = found.pop()
            if pid not in self._known:
                self._known[pid] = living[pid]
                found += children[pid]
        self._next = time.monotonic() + min(LOOK_SHARE * (time.process_time() - begun), LONGEST_PAUSE_S)

    def end(self, log: Path) -> None:
        """Wait for the end of all, then kill those that are left, and write into `log` which.

        A parent comes before its children: what ends when its parent does may tidy up first.
        """
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < END_WITHIN_S:
            self.look(now=True)
            if not self._known:
                return
            if waited > BY_THEMSELVES_S:
                self._kill([pid for pid, (parent, _) in self._known.items() if parent not in self._known], log)
                time.sleep(TIDY_S)
            time.sleep(0.1)

    def _kill(self, pids: list[int], log: Path) -> None:
        for pid in pids:
            name = command_of(pid)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                with log.open("a", encoding="utf-8") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} the driver has died; ended with SIGKILL: {pid} {name}\n")


def command_of(pid: int) -> str:
    """The beginning of a process's command line, or its title; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:120]
    except OSError:
        return ""


def end(pid: int, directory: Path, words: str) -> None:
    """Write the report and end the driver."""
    taken = [int(path.stem) for path in directory.glob("*.md") if re.fullmatch(r"\d+", path.stem)] if directory.exists() else []
    with contextlib.suppress(OSError):
        directory.mkdir(exist_ok=True)  # never the run's own directory, which may be away
        path = directory / f"{max(taken, default=0) + 1:03d}.md"
        path.write_text(f"# {words}\n\nIt is ended with SIGKILL.\n\n## Stacks\n\n```\n{stacks(pid)}\n```\n", encoding="utf-8")
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def stacks(pid: int) -> str:
    """The driver's Python stacks by py-spy, or why there are none."""
    beside = Path(sys.executable).with_name("py-spy")
    spy = str(beside) if beside.exists() else shutil.which("py-spy")
    if spy is None:
        return "py-spy is not installed"
    try:
        done = subprocess.run(
            [spy, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=DUMP_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy: {error}"
    return done.stdout if done.returncode == 0 else done.stderr


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
