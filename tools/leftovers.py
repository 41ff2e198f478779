"""What a run has left on its machine: processes that still live, and shared memory that nobody uses."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

POLL_S = 0.1
WAIT_S = 10.0


def living(processes: Iterable[psutil.Process], within_s: float = WAIT_S) -> list[psutil.Process]:
    """Returns those that still live after `within_s` seconds; none as soon as all have ended.

    Not `psutil.wait_procs`: it fails where the id of one is a thread's by now.
    """
    deadline = time.monotonic() + within_s
    while (left := [each for each in processes if _lives(each)]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return left


def processes(pids: Iterable[int]) -> list[psutil.Process]:
    """Returns those of these ids that are there."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shared_memory() -> set[str]:
    """Returns the names of what lies in the machine's shared memory now."""
    return set(os.listdir("/dev/shm"))


def left_in_shared_memory(before: set[str], within_s: float = WAIT_S) -> set[str]:
    """Returns what has come since `before` and stays for `within_s` seconds, although no living process has it mapped.

    Others use shared memory too, and have not mapped theirs in its first moment.
    """
    deadline = time.monotonic() + within_s
    left = shared_memory() - before - _mapped()
    while left and time.monotonic() < deadline:
        time.sleep(POLL_S)
        left &= shared_memory() - _mapped()
    return left


def _mapped() -> set[str]:
    """Returns the names of what lies in shared memory and is mapped by a living process."""
    inodes: set[int] = set()  # glibc maps a semaphore by another name, before it gives it this one
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            inodes.update(int(number) for number in re.findall(r" (\d+) +/dev/shm/", maps.read_text(errors="replace")))
    return {entry.name for entry in os.scandir("/dev/shm") if entry.inode() in inodes}
