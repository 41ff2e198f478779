"""The watch over the driver itself: a thread that measures how late the event loop is, and a process that looks after the thread.

    loop late for frozen_s          the thread writes a report and ends the process with exit code FROZEN
    Ray stopped (SIGSTOP)           the thread ends that process: the loop may wait for it, and with it the watchdog
    thread silent for frozen_s      the whole interpreter is held, as by a search that does not end: the guard does, with SIGKILL
    driver stopped (SIGSTOP)        the guard does it after STOPPED_S; a guard that is stopped with it, as by Ctrl-Z or
                                    `scontrol suspend`, forgives
    driver gone before `close`      the guard ends the processes below it that do not end by themselves

Whoever started the command, such as a job file, may start it again with `--resume`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ctpo_megatron.cluster.watch import guard
from ctpo_megatron.record.heartbeat import Stage
from ctpo_megatron.record.stall_report import next_report

FROZEN = 70  # the command's exit code when its event loop is frozen; EX_SOFTWARE of sysexits.h
EVERY_S = 1.0
OVERSLEPT_S = 5.0  # of the thread: then the process was stopped, or had no processor, and its loop is not to blame
LOOP_ACTS_WITHIN_S = 3.0  # where it is free, it ends what is stopped itself, and writes a report
WRITE_S = 10.0  # for the report; the disk may be what the loop waits for


class LoopWatch:
    """Watches the event loop that `start` is called in. `stages`: of the driver, for the report."""

    def __init__(self, frozen_s: float, run_dir: Path, stages: Callable[[], Sequence[Stage]]) -> None:
        self._frozen_s, self._run_dir, self._stages = frozen_s, run_dir, stages
        self._marked = time.monotonic()
        self._asked = self._marked
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._main = threading.get_ident()
        self._others: Mapping[str, int] = {}
        self._stopped_s = math.inf
        self._running: dict[int, float] = {}  # when each of the others was last seen not to be stopped

    def start(self) -> None:
        """Begin. To be called in the loop's thread."""
        loop = asyncio.get_running_loop()
        self._main = threading.get_ident()
        words = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(self._frozen_s), str(self._run_dir.absolute())]
        # unbuffered: a byte is there when it is written. No stream of the command's: whoever reads them waits for their end
        self._guard = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._thread = threading.Thread(target=self._run, args=(loop,), name="loop-watch", daemon=True)
        self._thread.start()

    def end_stopped(self, processes: Mapping[str, int], stopped_s: float) -> None:
        """End these processes of this host, by their ids, where they stay stopped for longer than `stopped_s` and a while.

        A call of Ray's own, such as `ray.put`, waits for a raylet in the loop's thread, without a bound.
        """
        self._others, self._stopped_s = processes, stopped_s + LOOP_ACTS_WITHIN_S

    def lag_s(self) -> float:
        """Returns how late the loop is now in seconds, or was when it was last asked."""
        return max(0.0, self._marked - self._asked if self._marked >= self._asked else time.monotonic() - self._asked)

    def close(self) -> None:
        """End the thread and the guard: the driver has ended its processes. Safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * EVERY_S)
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.kill()  # before it hears of an end: this one is in order
            self._guard.wait()
            self._guard.stdin.close()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        self._ask(loop)
        slept = time.monotonic()
        while not self._stop.wait(EVERY_S):
            self._beat()
            now = time.monotonic()
            overslept, slept = now - slept > EVERY_S + OVERSLEPT_S, now
            self._look_at_others(now, forgive=overslept)
            if self._marked >= self._asked or overslept:
                self._ask(loop)
            elif now - self._asked > self._frozen_s:
                self._end(now - self._asked)

    def _look_at_others(self, now: float, *, forgive: bool) -> None:
        for name, pid in self._others.items():
            if forgive or guard.state_of(pid) != "T":
                self._running[pid] = now
            elif now - self._running.setdefault(pid, now) > self._stopped_s:
                print(f"{name} is stopped (SIGSTOP), and the driver may wait for it: it is ended", file=sys.stderr, flush=True)
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _ask(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asked = time.monotonic()
        with contextlib.suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(self._mark)

    def _mark(self) -> None:
        self._marked = time.monotonic()

    def _beat(self) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it is gone; the run goes on without it
                self._guard.stdin.write(b".")

    def _end(self, late_s: float) -> None:
        frame = sys._current_frames().get(self._main)
        stack = "" if frame is None else "".join(traceback.format_stack(frame))
        doing = "\n".join(f"- {stage} since {stage.seconds:.0f} s" for stage in self._stages())
        path = next_report(self._run_dir)
        text = (
            f"# The driver's event loop is frozen for {late_s:.0f} s\n\nThe process ends with exit code {FROZEN}.\n\n"
            f"## Driver\n\n{doing}\n\n## Stack of its thread\n\n```\n{stack}```\n"
        )
        writer = threading.Thread(target=_write, args=(path, text), daemon=True)
        writer.start()
        writer.join(WRITE_S)
        last = stack.strip().splitlines()[-2:]
        print(
            f"error: the driver's event loop is frozen for {late_s:.0f} s, at {' '.join(last).strip()}; report: {path}",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(FROZEN)


def _write(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)  # never the run's own directory, which may be away
        path.write_text(text, encoding="utf-8")
