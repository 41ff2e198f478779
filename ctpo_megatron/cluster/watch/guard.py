"""Looks after the driver from outside: `python -I -S guard.py PID FROZEN_S DIRECTORY`, with a byte a second on standard input.

The end of the input means that the driver has ended, and so does this process. It imports the standard library alone: it lives
through the whole run.
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
from pathlib import Path

STOPPED_S = 10.0
EVERY_S = 1.0
OVERSLEPT_S = 5.0  # of this process: then it was stopped with the driver, or had no processor
DUMP_S = 10.0


def main(pid: int, frozen_s: float, directory: Path) -> None:
    """Watch process `pid` until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they reach the whole terminal; the driver is still ending its processes
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
        if state != "T":
            running = now
        if overslept:
            heard = running = now
        elif now - running > STOPPED_S:
            end(pid, directory, f"The driver is stopped (SIGSTOP) for {now - running:.0f} s")
        elif state != "T" and now - heard > frozen_s + STOPPED_S:  # its own thread comes first, and says more
            end(pid, directory, f"The driver's interpreter is held for {now - heard:.0f} s: no thread of it comes to its turn")


def state_of(pid: int) -> str:
    """The state letter of a process; empty when it is gone. `t`, of a process that a debugger holds, is not T."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
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
    sys.exit(0)


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
