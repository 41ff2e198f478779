"""The bounded hand-over between rollouts and training; staleness is a number of admission slots.

Group k belongs to training step k // groups_per_step. It may start once policy version `step - staleness` is published, so at
most (staleness + 1) * groups_per_step groups are open at any time. With staleness 0 no group of a step starts before the weights
of the step before are on the servers: synchronous training. A step takes exactly its own groups, however long the slowest
takes, so no prompt is favoured for being quick.

    admit() ----> rollout ----> put(group) ----> take(step)
       ^                                             |
       +------------- published(version) <-----------+
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

from ctpo_megatron.types import TrajectoryGroup


class GroupBuffer:
    """Version v is the policy after v training steps; step s trains version s into s + 1.

    Example with groups_per_step=2, staleness=1: groups 0-3 start at once, 4 and 5 when version 1 is published.
    """

    def __init__(self, *, groups_per_step: int, staleness: int, first_step: int, last_step: int) -> None:
        self._per_step = groups_per_step
        self._staleness = staleness
        self._version = first_step
        self._admitted = first_step * groups_per_step
        self._end = last_step * groups_per_step
        self._groups: dict[int, list[TrajectoryGroup]] = defaultdict(list)
        self._changed = asyncio.Condition()

    async def admit(self) -> int | None:
        """Wait for the next group's turn; returns the step it belongs to, None when all groups of the run are admitted."""
        if self._admitted >= self._end:
            return None
        step = self._admitted // self._per_step
        async with self._changed:
            await self._changed.wait_for(lambda: step - self._staleness <= self._version)
        self._admitted += 1
        return step

    async def put(self, group: TrajectoryGroup) -> None:
        """Hand in a finished group under its `step`."""
        async with self._changed:
            self._groups[group.step].append(group)
            self._changed.notify_all()

    async def take(self, step: int) -> list[TrajectoryGroup]:
        """Returns all groups of `step`, ordered by prompt, once the last one is in."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._groups[step]) == self._per_step)
        return sorted(self._groups.pop(step), key=lambda group: group.prompt.index)

    def finished(self, step: int) -> int:
        """Returns how many groups of `step` are in."""
        return len(self._groups[step])

    async def published(self, version: int) -> None:
        """Note that the servers now sample from `version`."""
        async with self._changed:
            self._version = version
            self._changed.notify_all()
