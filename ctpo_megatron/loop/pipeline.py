"""Rollouts as tasks: one feeds prompts in, one for each open group collects it, and a step takes what they have made.

    feed       waits for room in the buffer, admits the next group, and starts its collector
    collect    samples a group to its end, whatever weights are published meanwhile, has it taught, and puts it into the buffer
    take       waits until a step can be made, and enters it in the ledger

An attempt that fails is data: its group ends as failed and another one takes its place. It is not trained on with fewer attempts:
the group's size is part of the estimate of the advantages, and attempts that fail may be of one kind (the long ones). More
failures than `rollout.failed_share` end the run, and so does at once what is no attempt's fault. An attempt whose reward is
undecided is none: it is worth 0, and more of them than `rollout.undecided_share` end the run as well.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.loop.admission import Admission, Admitted, Position
from ctpo_megatron.loop.buffer import GroupBuffer
from ctpo_megatron.loop.failures import FailureShare, UndecidedShare
from ctpo_megatron.loop.ledger import Ledger
from ctpo_megatron.loop.protocols import Rollouts, Teachers
from ctpo_megatron.record.events import Emit
from ctpo_megatron.record.rollout_events import GroupFailed
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.types import FailedAttempt, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Taken:
    """The groups of a step, what the ledger says of it, and where a run goes on behind it."""

    groups: list[TrajectoryGroup]
    metrics: dict[str, float]
    position: Position


class Pipeline:
    """Everything between the prompts and the groups of a step. `buffer` decides what these are; `teachers` are asked of each."""

    def __init__(
        self,
        admission: Admission,
        buffer: GroupBuffer,
        ledger: Ledger,
        rollouts: Rollouts,
        config: RolloutConfig,
        emit: Emit,
        teachers: Teachers | None = None,
    ) -> None:
        self.buffer, self._ledger, self._teachers = buffer, ledger, teachers
        self._admission, self._rollouts, self._config, self._emit = admission, rollouts, config, emit
        self._failures = FailureShare(config.failed_share, config.failed_window)
        self._undecided = UndecidedShare(config.undecided_share, config.failed_window)
        self._sampling = Sampling(
            config.temperature,
            config.max_turns,
            config.max_response_tokens,
            record=True,
            truncation=config.truncation,
            deadline_s=config.deadline_s,
        )

    async def feed(self) -> None:
        """Admit groups until all steps are made. Raises what a group raises."""
        async with asyncio.TaskGroup() as running:
            tasks = {self._begin(running, group, group.version) for group in self._admission.reopened}
            while await self.buffer.room(self._admission.groups):
                group = self._admission.next(self.buffer.version)
                self._ledger.admit(group)
                task = self._begin(running, group)
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            for task in tasks:
                task.cancel()

    def _begin(self, running: asyncio.TaskGroup, group: Admitted, version: int | None = None) -> asyncio.Task[None]:
        failed = self.buffer.begin(group.id.number, group.prompt, version)
        return running.create_task(self._collect(group, failed))

    async def _collect(self, group: Admitted, failed: tuple[FailedAttempt, ...]) -> None:
        """Sample a group and put it into the buffer. `failed`: its attempts, where it is on record that it fails."""
        if failed:
            self.buffer.put(TrajectoryGroup(group.prompt, [], id=group.id, failed=list(failed)))
            return
        made = await self._rollouts.group(
            group.prompt, group.id, size=self._config.group_size, sampling=self._sampling, keep_failed=True
        )
        if self._teachers is not None and made.trajectories:
            made = await self._teachers.teach(made)
        for attempt in made.failed:
            if not attempt.aborted:
                self._emit(GroupFailed(str(group.id), str(attempt.id), attempt.reason))
        self._failures.add(made)
        self._undecided.add(made)
        self.buffer.put(made)

    async def take(self, step: int) -> Taken:
        """Returns the groups of `step`, from 0, once it can be made."""
        made = await self.buffer.take(step)
        metrics = self._ledger.settle(step + 1, made) | {"ledger/carried": float(self.buffer.rules.carried(made.groups, step))}
        metrics |= {} if self._teachers is None else self._teachers.metrics()
        judged = (each.made for each in made.ended if each.made is not None and each.made.trajectories)
        self._admission.observe([*made.groups, *judged])
        return Taken(made.groups, metrics, self._admission.position(self._ledger.open))
