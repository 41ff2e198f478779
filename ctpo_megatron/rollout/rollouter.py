"""Groups of trajectories, a bounded number of them in flight."""

from __future__ import annotations

import asyncio

from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.rollout.protocols import Environment, Sampling
from ctpo_megatron.types import AttemptId, GroupId, Prompt, Trajectory, TrajectoryGroup


class Rollouter:
    """Samples groups with one environment; at most `config.concurrency` trajectories of all groups run at a time."""

    def __init__(self, environment: Environment, config: RolloutConfig) -> None:
        self._environment = environment
        self._config = config
        self._slots = asyncio.Semaphore(config.concurrency)

    async def group(
        self, prompt: Prompt, group: GroupId, *, size: int, temperature: float, record: bool = False
    ) -> TrajectoryGroup:
        """Returns `size` attempts at one prompt. The first attempt that fails ends the others, and its exception comes out.

        `record`: with what training needs of the engine besides tokens and log-probs. Sessions are numbered through, from group
        to group and attempt to attempt, which spreads them evenly over the servers.
        """
        sampling = Sampling(temperature, self._config.max_turns, self._config.max_response_tokens, record)
        ids = [AttemptId(group, number) for number in range(size)]
        try:
            async with asyncio.TaskGroup() as running:
                attempts = [
                    running.create_task(self._attempt(prompt, each, group.number * size + each.number, sampling)) for each in ids
                ]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return TrajectoryGroup(prompt, [attempt.result() for attempt in attempts], id=group)

    async def _attempt(self, prompt: Prompt, attempt: AttemptId, session: int, sampling: Sampling) -> Trajectory:
        async with self._slots:
            return await self._environment.run(prompt, attempt, session, sampling)
