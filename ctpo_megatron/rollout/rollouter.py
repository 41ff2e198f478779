"""Groups of trajectories, a bounded number of them in flight."""

from __future__ import annotations

import asyncio
import itertools

from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.rollout.protocols import Environment, Sampling
from ctpo_megatron.types import Prompt, Trajectory, TrajectoryGroup


class Rollouter:
    """Samples groups with one environment; at most `config.concurrency` trajectories of all groups run at a time."""

    def __init__(self, environment: Environment, config: RolloutConfig) -> None:
        self._environment = environment
        self._config = config
        self._slots = asyncio.Semaphore(config.concurrency)
        self._sessions = itertools.count()

    async def group(self, prompt: Prompt, *, size: int, temperature: float, record: bool = False) -> TrajectoryGroup:
        """`size` attempts at one prompt. The first attempt that fails ends the others, and its exception comes out.

        `record`: with what training needs of the engine besides tokens and log-probs.
        """
        sampling = Sampling(temperature, self._config.max_turns, self._config.max_response_tokens, record)
        try:
            async with asyncio.TaskGroup() as running:
                attempts = [running.create_task(self._attempt(prompt, next(self._sessions), sampling)) for _ in range(size)]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return TrajectoryGroup(prompt, [attempt.result() for attempt in attempts])

    async def _attempt(self, prompt: Prompt, session: int, sampling: Sampling) -> Trajectory:
        async with self._slots:
            return await self._environment.run(prompt, session, sampling)
