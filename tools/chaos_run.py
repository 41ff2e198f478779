"""A run that is kept going as a job file does it: what it says, what it is doing now, and all processes it ever had."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from chaos_faults import NUMBERS, RANKS, Fault, Phase, find, title
from leftovers import living

from ctpo_megatron.slurm.requeue import what_next

POLL_S = 0.005
ENDS_WITHIN_S = 30.0
SEEN_EVERY_S = 0.3
FRESH_S = 0.4  # after an event, the phase that it begins is surely not over
ERROR_FILE = "logs/error.log"
WORK = {"training": (".update",), "publishing": (".publish", ".prepare", ".canary_logp")}  # of a rank, by its title

Event = dict[str, Any]


class Run:
    """`ctpo train --resume auto` in `run_dir`, started again whenever a job file would do so."""

    def __init__(self, words: list[str], run_dir: Path, evaluate_every: int, save_every: int) -> None:
        self.run_dir = run_dir
        self.starts = 0
        self.failed: str | None = None  # why nobody would start it again
        self.done = False
        self.seen: dict[int, psutil.Process] = {}  # every process that the run ever had
        self._words = [sys.executable, "-m", "ctpo_megatron.cli", "train", *words, "--resume", "auto"]
        self._evaluate_every, self._save_every = evaluate_every, save_every
        self._log = run_dir.with_suffix(".log")
        self._read, self._events = 0, list[Event]()
        self._driver: subprocess.Popen[bytes] | None = None
        self._process: psutil.Process | None = None
        self._ranks: list[psutil.Process] = []
        self._begun = 0.0
        self._sessions: set[int] = set()  # of all commands
        self._closed = threading.Event()
        threading.Thread(target=self._see, daemon=True).start()

    @property
    def driver(self) -> psutil.Process:
        """Returns the process of the command."""
        assert self._process is not None, "the run is not started"
        return self._process

    def start(self) -> None:
        """Start the command in the run directory."""
        self.starts += 1
        self._begun = time.time()
        with self._log.open("a") as sink:
            self._driver = subprocess.Popen(self._words, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
        self._process = psutil.Process(self._driver.pid)
        self._sessions.add(self._driver.pid)

    def attend(self) -> None:
        """Look whether the command has ended, and start it again where a job file would."""
        assert self._driver is not None, "the run is not started"
        code = self._driver.poll()
        if code is None or self.done or self.failed is not None:
            return
        error = self.run_dir / ERROR_FILE
        told = error.is_file() and error.stat().st_mtime >= self._begun
        match what_next(code, told=told, ray_lost=False):
            case "done":
                self.done = True
            case "failed":
                self.failed = f"the command ended with exit code {code}; {self._log} says why"
            case _:
                self.start()

    def events(self) -> list[Event]:
        """Returns all that has happened so far."""
        path = self.run_dir / "events.jsonl"
        if path.is_file():
            with path.open("rb") as file:
                file.seek(self._read)
                content = file.read()
            whole = content.rfind(b"\n") + 1
            self._read += whole
            self._events += [json.loads(line) for line in content[:whole].splitlines()]
        return self._events

    def wait(self, is_it: Callable[[], Any], timeout_s: float) -> Any:
        """Returns what `is_it` says as soon as that is true; None where time runs out or the run is over before."""
        deadline = time.monotonic() + timeout_s
        while not (found := is_it()):
            self.attend()
            if self.done or self.failed or time.monotonic() > deadline:
                return None
            time.sleep(POLL_S)
        return found

    def event_after(self, since: float, names: tuple[str, ...]) -> Event | None:
        """Returns the first event of one of these names after `since`, seconds since 1970."""
        return next((each for each in self.events() if each["time"] >= since and each["event"] in names), None)

    def is_in(self, phase: Phase) -> bool:
        """Whether the run is in that phase now, as far as one sees it from outside."""
        if phase == "start":
            return self._last("ready", "incarnation began", "incarnation ended") != "ready"
        if phase == "stopping":
            return self._last("stop requested", "incarnation began", "incarnation ended") == "stop requested"
        if self._last("ready", "incarnation began", "stop requested", "incarnation ended") != "ready":
            return False
        if phase in WORK:
            return self._works(WORK[phase])
        return self._begins(phase)

    def strike(self, fault: Fault) -> float | None:
        """Send the signal; returns when, in seconds since 1970, or None where there is no such process now."""
        process = find(fault.kind, self.driver)
        if process is None:
            return None
        at = time.time()  # before it: on a busy host the run may answer before this process comes to its turn again
        with contextlib.suppress(psutil.Error):
            process.send_signal(NUMBERS[fault.by])
            return at
        return None

    def end(self) -> None:
        """Kill whatever is left of it."""
        self._closed.set()
        for process in [*self.seen.values(), *self._of_sessions()]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self._driver is not None:
            self._driver.wait(10)

    def left(self) -> list[psutil.Process]:
        """Returns the processes of the run that still live when it is over."""
        self._closed.set()
        return living([*self.seen.values(), *self._of_sessions()], ENDS_WITHIN_S)

    def _of_sessions(self) -> list[psutil.Process]:
        """Returns the processes of the commands' sessions: one that lived for a moment, and lost its parent, was not seen."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):  # it has just ended
                if os.getsid(process.pid) in self._sessions:
                    found.append(process)
        return found

    def _works(self, endings: tuple[str, ...]) -> bool:
        """Whether a rank says by its title that it does one of these. Looking for the ranks takes longer than asking them."""
        with contextlib.suppress(psutil.Error):
            if self._ranks and all(each.is_running() for each in self._ranks):
                return any(title(rank).endswith(endings) for rank in self._ranks)
        found = [find(kind, self.driver) for kind in RANKS]
        self._ranks = [each for each in found if each is not None]
        return False

    def _begins(self, phase: Phase) -> bool:
        """Whether the newest event says that the phase has just begun."""
        events = self.events()
        if not events or time.time() - events[-1]["time"] > FRESH_S:
            return False
        name, version = events[-1]["event"], events[-1].get("version", -1)
        if phase == "rollout":
            return name == "step"
        if name != "published" or version <= 0:
            return False
        evaluates, saves = version % self._evaluate_every == 0, version % self._save_every == 0
        return evaluates if phase == "evaluating" else saves and not evaluates

    def _last(self, *names: str) -> str:
        """Returns which of these events came last; the first of `names` stands for none."""
        return next((each["event"] for each in reversed(self.events()) if each["event"] in names), "")

    def _see(self) -> None:
        while not self._closed.wait(SEEN_EVERY_S):
            process = self._process
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    self.seen |= {each.pid: each for each in [process, *process.children(recursive=True)]}
