"""What a node's system says of the processes on it: their state, the processors they use, their stacks. No Ray, no torch.

A process that is stopped cannot answer, and one that holds its interpreter does not: somebody else has to look.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from ctpo_megatron.cluster.logs import STACK_SIGNAL
from ctpo_megatron.record.stalls import BUSY, Condition

DUMP_S = 5.0  # for the stacks of one process
DUMPS_AT_ONCE = 4
WRITTEN_S = 0.5  # for that


@dataclass(slots=True)
class _Known:
    process: psutil.Process
    state: str
    since: float
    looks: int
    cpu_s: float
    at: float
    turns: Turns | None


@dataclass(frozen=True, slots=True)
class Turns:
    """What the scheduler counts of a thread since it began."""

    thread: int
    ran_s: float
    waited_s: float  # that it could have run and had no processor; a wait is counted when it ends


class Witness:
    """Looks at the processes of one node."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def look(self, pids: Mapping[int, int]) -> dict[int, Condition]:
        """The conditions of those that live. `pids`: for each process its working thread by the system's number, 0: not known."""
        found, now = {}, time.monotonic()
        for pid, thread in pids.items():
            with contextlib.suppress(psutil.Error, OSError):
                found[pid] = self._look(pid, thread, now)
        for pid in self._known.keys() - found.keys():
            del self._known[pid]
        return found

    def _look(self, pid: int, thread: int, now: float) -> Condition:
        known = self._known.get(pid)
        process = psutil.Process(pid) if known is None else known.process
        with process.oneshot():
            state, times = process.status(), process.cpu_times()
        cpu_s = times.user + times.system
        if known is None or known.state != state:
            since, looks = now, 1
        else:
            since, looks = known.since, known.looks + 1
        cpus = 0.0 if known is None or now <= known.at else (cpu_s - known.cpu_s) / (now - known.at)
        had, of_thread = turns(pid, thread or pid), _of_thread(pid, thread) or state
        wants = of_thread == psutil.STATUS_RUNNING and cpus < BUSY  # without ticks a long turn is not counted at once
        share = None if known is None else waited(known.turns, had, now - known.at, wants=wants)
        self._known[pid] = _Known(process, state, since, looks, cpu_s, now, had)
        return Condition(of_thread, now - since, looks, cpus, _place(pid, thread), share)

    def forget(self) -> None:
        """Begin anew: for a witness that was itself stopped meanwhile, and has seen nothing."""
        self._known.clear()

    def kill(self, pid: int) -> None:
        """End a process that cannot end in order."""
        with contextlib.suppress(psutil.Error, OSError):
            (self._known[pid].process if pid in self._known else psutil.Process(pid)).kill()

    def stacks(self, logs: Mapping[int, str]) -> dict[int, str]:
        """The Python stacks of processes, or the reason why there are none.

        `logs`: for each process the file that it writes to when it gets STACK_SIGNAL; empty for one that does not.
        """
        with ThreadPoolExecutor(DUMPS_AT_ONCE) as pool:
            return dict(zip(logs, pool.map(lambda each: dump(*each), logs.items()), strict=True))


def dump(pid: int, log: str = "") -> str:
    """The Python stacks of a process: by py-spy, where the system lets it read, else by the process's own faulthandler."""
    spy = _spy()
    said = "py-spy is not installed"
    if spy is not None:
        # it does not stop the process to read it, nor let one go on that is stopped
        command = [spy, "dump", "--nonblocking", "--pid", str(pid)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DUMP_S, check=False)
        except subprocess.TimeoutExpired:
            said = f"py-spy did not end within {DUMP_S:g} s"
        else:
            if done.returncode == 0:
                return done.stdout.strip()
            said = " ".join(done.stderr.split())
    return _by_signal(pid, Path(log)) or f"no stacks: {said}" if log else f"no stacks: {said}"


def _by_signal(pid: int, log: Path) -> str:
    """What the process wrote to its log when it was asked for its stacks; empty for one that is stopped."""
    try:
        before = log.stat().st_size
        os.kill(pid, STACK_SIGNAL)
        time.sleep(WRITTEN_S)
        with log.open("rb") as file:
            file.seek(before)
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


def _spy() -> str | None:
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def _of_thread(pid: int, thread: int) -> str:
    """The state of the working thread where it computes or is blocked in the kernel; empty otherwise.

    The process's own state is that of its first thread, and may not show it.
    """
    if not thread or thread == pid:
        return ""
    try:
        state = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return {"D": psutil.STATUS_DISK_SLEEP, "R": psutil.STATUS_RUNNING}.get(state, "")


def turns(pid: int, thread: int) -> Turns | None:
    """What the scheduler counts of a thread; None where the system does not tell, as where a kernel was built without."""
    try:
        ran, waits, _count = map(int, Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split())
    except (OSError, ValueError):
        return None
    return Turns(thread, ran / 1e9, waits / 1e9) if ran else None


def waited(before: Turns | None, now: Turns | None, seconds: float, *, wants: bool) -> float | None:
    """Returns the share of `seconds` that a thread waited for a processor. `wants`: it can run now.

    A wait that has not ended is not counted yet: one that can run, and has not run since the look before, has waited throughout.
    """
    if before is None or now is None or before.thread != now.thread or seconds <= 0:
        return None
    if wants and now.ran_s == before.ran_s:
        return 1.0
    return min((now.waited_s - before.waited_s) / seconds, 1.0)


def _place(pid: int, thread: int) -> str:
    """The kernel's function that the working thread sleeps in; empty where it is not told."""
    try:
        where = Path(f"/proc/{pid}/task/{thread or pid}/wchan").read_text().strip()
    except OSError:
        return ""
    return "" if where == "0" else where
