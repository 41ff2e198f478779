"""The order to stop that the wall-time limit of a SLURM job gives: early enough for the run to save what it has.

How early is learned from the run's own events, so it needs no setting. SLURM is asked now and then, as an administrator may move
the limit, and once more before the order is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from ctpo_megatron.errors import StorageError
from ctpo_megatron.loop.orders import Orders, StopRequest
from ctpo_megatron.record.events import CheckpointVerified, Emit, Event, StepTrained
from ctpo_megatron.record.run_events import JobEnds, JobEndUnknown
from ctpo_megatron.slurm.allocation import allocation, end_time
from ctpo_megatron.slurm.commands import SlurmError

FLOOR_S = 60.0  # for what is not measured: the end of all processes, on GPUs half a minute
TIMES = 1.5  # of what was measured
REMEMBERED = 16  # of the last saves and steps: one that a busy disk made slow is forgotten some day
UNINTERRUPTED = ("batch", "sleep", "train", "measure", "publish")  # phases of a step that a stop waits for
LOOK_S = 1.0
ASK_EVERY_S = 120.0


class Lead:
    """How long before its end a run has to be told of it. Call it with the run's events: it learns from them."""

    def __init__(self) -> None:
        self._saves: deque[float] = deque(maxlen=REMEMBERED)
        self._phases: deque[float] = deque(maxlen=REMEMBERED)

    def __call__(self, event: Event) -> None:
        """Learn from `event`, where it tells how long something took."""
        if isinstance(event, CheckpointVerified):
            self._saves.append(event.seconds)
        elif isinstance(event, StepTrained):
            self._phases.append(sum(event.phases.get(phase, 0.0) for phase in UNINTERRUPTED))

    @property
    def seconds(self) -> float:
        """Returns the lead: a save, after the longest of what it may have to wait for, with a margin and the floor.

        It waits for the phase that the trainer is in, and meanwhile for a save in the background that has just begun.
        """
        save, phase = max(self._saves, default=0.0), max(self._phases, default=0.0)
        return FLOOR_S + TIMES * (max(save, phase) + save)


@dataclass(frozen=True)
class TimeLimit:
    """The limit of a job. `ask`: returns when the job ends in seconds since 1970, None without a limit; it may block, or raise
    SlurmError. `grace_s`: how long after the limit the run may go on to save. `clock`: seconds since 1970.
    """

    ask: Callable[[], float | None]
    lead: Lead
    grace_s: float
    emit: Emit
    clock: Callable[[], float] = time.time
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def watch(self, orders: Orders) -> None:
        """Give the order to stop when the time that is left is shorter than the lead; returns then, never without a limit."""
        end: float | None = None
        ask_at, silent = self.clock(), False
        while True:
            if self.clock() >= ask_at or self._is_near(end):
                try:
                    told = await asyncio.to_thread(self.ask)
                except (SlurmError, OSError) as error:  # what it said last counts
                    if not silent:
                        self._tell(JobEndUnknown(str(error)))
                    silent = True
                else:
                    silent = False
                    if told != end:
                        self._tell(JobEnds(told, None if told is None else told - self.clock()))
                    end = told
                ask_at = self.clock() + ASK_EVERY_S
                if end is not None and self._is_near(end):
                    orders.stop(self._request(end - self.clock()))
                    return
            await self.pause(LOOK_S)

    def _is_near(self, end: float | None) -> bool:
        return end is not None and end - self.clock() < self.lead.seconds

    def _tell(self, event: Event) -> None:
        with contextlib.suppress(StorageError):  # a full disk is no reason to be late
            self.emit(event)

    def _request(self, left_s: float) -> StopRequest:
        words = f"the job's time limit is {left_s:.0f} s away, and to stop may take {self.lead.seconds:.0f} s"
        return StopRequest(words, max(0.0, left_s) + self.grace_s)


def time_limit(lead: Lead, grace_s: float, emit: Emit, environment: Mapping[str, str] = os.environ) -> TimeLimit | None:
    """Returns the limit of the SLURM job that this process belongs to, None outside of SLURM."""
    job = allocation(environment)
    return None if job is None else TimeLimit(partial(end_time, job, environment), lead, grace_s, emit)
