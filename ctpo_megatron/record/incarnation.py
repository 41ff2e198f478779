"""The part of a run's story that one process tells: that it begins, what happens, and how it ends.

Used as `with IncarnationLog(run_dir, [print_sentence]) as events`: until `events.begin(...)` input is checked, and what happens
is held back; from there on the run is worked on, and events are written at once; in the end it is written how it ended, and where
the time of all incarnations went.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import psutil

import ctpo_megatron
from ctpo_megatron.errors import InputError, StorageError, told
from ctpo_megatron.record.events import Emit, Event, EventLog
from ctpo_megatron.record.files import Through, at_once
from ctpo_megatron.record.goodput import Goodput, account
from ctpo_megatron.record.origin import commit, host, safe_words, slurm_job
from ctpo_megatron.record.run_events import RunStopped, StopRequested
from ctpo_megatron.record.story import Incarnation, Story, read_story
from ctpo_megatron.record.story_events import How, IncarnationBegan, IncarnationEnded

LONGEST_REASON = 300  # characters of an error's first line


class IncarnationLog:
    """One process's work on the run in `run_dir`. Call it to emit; `readers` hear every event at once.

    What is emitted before `begin` is written behind the beginning, or when it is left without one, as by a command that was
    refused. An incarnation that left no end behind is noticed, and counted as killed at its last sign of life.

    `through`: how lines are written.
    """

    def __init__(self, run_dir: Path, readers: Iterable[Emit] = (), through: Through = at_once) -> None:
        self._run_dir, self._path = run_dir, run_dir / "events.jsonl"
        self._log, self._readers = EventLog(self._path, through=through), tuple(readers)
        self._held: list[tuple[float, Event]] = []
        self._number: int | None = None  # None: not begun
        self._asked, self._stopped = "a signal", ""
        self._over = False

    def __call__(self, event: Event) -> None:
        """Tell the readers of `event` and write it down. Raises StorageError where the disk does not take it."""
        for reader in self._readers:
            reader(event)
        if isinstance(event, StopRequested):
            self._asked = event.reason
        if isinstance(event, RunStopped):
            self._stopped = event.reason
        if self._number is None:
            self._held.append((time.time(), event))
        else:
            self._log(event)
            if self._over:  # it is of what ends later, and stands behind the end
                self._log.close()

    def begin(self, *, checkpoint: Path | None, step: int, total: int | None = None) -> None:
        """The input was checked, and the run begins anew, or goes on from `checkpoint` after `step` training steps.

        `total`: training steps of the whole run, where train.steps does not say it. Raises InputError where another process has
        begun to work in this directory, or its events.jsonl is damaged.
        """
        story = read_story(self._path)
        _refuse_living(story, self._run_dir)
        previous = self._notice_killed(story)
        self._number = len(story.incarnations) + 1
        process, job = psutil.Process().create_time(), slurm_job()
        self(
            IncarnationBegan(
                number=self._number,
                checkpoint=None if checkpoint is None else str(checkpoint),
                step=step,
                previous=previous,
                host=host(),
                pid=psutil.Process().pid,
                process=process,
                allocated=process if job is None or job.began is None else min(job.began, process),
                job=None if job is None else job.id,
                restarts=None if job is None else job.restarts,
                version=ctpo_megatron.__version__,
                commit=commit(),
                command=safe_words(sys.argv),
                total=total,
            )
        )
        self._write_held()

    def goodput(self, *, done: bool = False) -> Goodput:
        """Returns where the time of all incarnations went so far. `done`: this one has trained its last step."""
        return account(read_story(self._path), time.time(), done=done)

    def __enter__(self) -> IncarnationLog:
        """Raises InputError where another process works in this directory, before anything in it is written."""
        _refuse_living(read_story(self._path), self._run_dir)
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        # what ended the run stays the reason, also where the disk is full
        with contextlib.suppress(*([] if error is None else [StorageError, InputError])):
            if self._number is None:
                self._refused()
            else:
                how, reason = self._end(error)
                self(IncarnationEnded(self._number, how, reason, time.time()))
                self(self.goodput().event())
        self._log.close()
        self._over = True

    def _end(self, error: BaseException | None) -> tuple[How, str]:
        if self._stopped:
            return "stopped", self._stopped
        if error is None:
            return "done", ""
        if isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
            return "cancelled", self._asked
        first, *_ = [*told(error)[0].splitlines(), ""]
        return "failed", first[:LONGEST_REASON]

    def _refused(self) -> None:
        """Write down what was told before the command was refused, unless another process works here: the story is its own."""
        if not self._held:
            return
        story = read_story(self._path)
        if _living(story) is None:
            self._notice_killed(story)
            self._write_held()

    def _write_held(self) -> None:
        for at, event in self._held:
            self._log(event, at)
        self._held.clear()

    def _notice_killed(self, story: Story) -> How | None:
        """Write the end of an incarnation that was killed; returns how the last one ended."""
        if not story.incarnations:
            return None
        last = story.incarnations[-1]
        if last.ended is None:
            at = _last_sign(last, self._run_dir)
            self._log(IncarnationEnded(last.number, "killed", "it left no end behind", at))
            return "killed"
        how: How = last.ended.fields["how"]
        return how


def _last_sign(last: Incarnation, run_dir: Path) -> float:
    """Returns when a killed incarnation was last seen to do something: its last event, or what any of its processes logged."""
    signs = [each.time for each in last.events]
    for path in [run_dir / "metrics.jsonl", *run_dir.glob("logs/*.log")]:
        with contextlib.suppress(OSError):  # not there
            signs.append(path.stat().st_mtime)
    return min(max(signs), psutil.Process().create_time())


def _refuse_living(story: Story, run_dir: Path) -> None:
    """Raise InputError where the last incarnation has no end, and its process lives on this host."""
    if (process := _living(story)) is not None:
        number = story.incarnations[-1].began.fields.get("number")
        raise InputError(
            f"run_dir={run_dir}: process {process.pid} of this host works in it (incarnation {number}). "
            "Wait for its end, or choose another run_dir"
        )


def _living(story: Story) -> psutil.Process | None:
    """Returns the process of the last incarnation where that has no end and lives on this host, and is not this process."""
    if not story.incarnations or story.incarnations[-1].ended is not None:
        return None
    fields = story.incarnations[-1].began.fields
    if fields.get("host") != host():
        return None
    with contextlib.suppress(psutil.Error, ValueError, TypeError):
        process = psutil.Process(fields.get("pid"))
        if process.pid == psutil.Process().pid:  # this one, begun anew
            return None
        if process.create_time() == fields.get("process") and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
