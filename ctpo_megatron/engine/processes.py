"""The processes of a group, the shared memory that they leave behind, and their end.

Every process of a server imports this module at its start, so it imports little.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

CANNOT_LISTEN = 98  # exit code of a server whose port was taken after it was chosen; the next start has another
_SHM = "/dev/shm/"
_OF_TORCH = re.compile(r"torch_(\d+)_")  # with the process that made the file; torch removes it when nobody has it mapped
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of grandchildren whose parent died, so that it can reap them: containers often run
    without an init process that would. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def end_with_parent(number: signal.Signals | None) -> None:
    """Let this process get signal `number` when the thread that started it ends; None: no longer. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number or 0), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def reap_group(group: int, wait_s: float = 10.0) -> None:
    """Collect this process's dead children in `group`; one that has threads left to end is waited for."""
    deadline = time.monotonic() + wait_s
    with contextlib.suppress(ChildProcessError):  # the sign that none is left
        while os.waitpid(-group, os.WNOHANG)[0] or time.monotonic() < deadline:
            time.sleep(0.005)


def group_members(group: int) -> list[int]:
    """Process ids in the process group, without zombies."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                members.append(pid)
    return members


def names_of_group(group: int) -> tuple[tuple[str, int], ...]:
    """What the processes of a server are called and their ids: `http` for the one that leads the group, SGLang's titles else."""
    found = []
    for pid in group_members(group):
        with contextlib.suppress(psutil.Error, IndexError):
            title = psutil.Process(pid).cmdline()[0]  # SGLang sets it: `sglang::scheduler_TP0`
            found.append(("http" if pid == group else title.rpartition("::")[2].rpartition("/")[2], pid))
    return tuple(found)


def resident(pids: Iterable[int]) -> int:
    """Resident bytes of processes; what they share counts for each."""
    found = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found += psutil.Process(pid).memory_info().rss
    return found


def group_shared_memory(group: int) -> set[str]:
    """Paths of the files in /dev/shm that the group's processes have mapped. A process that is killed does not unlink them.

    Left out is what torch shares by name and another process has made, as a colocated sender its buckets: it goes on with them.
    They are read from `maps`: psutil reads `smaps`, for which the kernel walks all pages of a server.
    """
    found, members = set(), group_members(group)
    for pid in members:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                path = line.partition(_SHM)[2]
                maker = _OF_TORCH.match(path)
                if path and not path.endswith(" (deleted)") and (maker is None or int(maker[1]) in members):
                    found.add(_SHM + path)
    return found


def unlink_shared_memory(paths: set[str]) -> None:
    """Remove the files at `paths`; one that is gone already is fine."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def end_group(group: int, wait_s: float = 10.0) -> list[int]:
    """The ids of those processes that would not go: all of the group get SIGKILL, and its shared memory is removed."""
    segments = group_shared_memory(group)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + wait_s
    while (left := group_members(group)) and time.monotonic() < deadline:
        time.sleep(0.02)
    unlink_shared_memory(segments)
    return left
