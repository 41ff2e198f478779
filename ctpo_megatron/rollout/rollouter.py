"""Groups of trajectories, a bounded number of them in flight, none of which is lost when the run is interrupted."""

from __future__ import annotations

import asyncio

from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.protocols import AttemptStore, Environment, Interruptible, Sampling
from ctpo_megatron.types import AttemptId, GroupId, Prompt, Trajectory, TrajectoryGroup


class Rollouter:
    """Samples groups with one environment; at most `config.concurrency` trajectories of all groups run at a time.

    `store`: where attempts are looked for before they are made, and kept; None: nowhere. `engine`: what they sample from, where
    it can be interrupted. `aside`: an environment over servers that are set aside, and how many trajectories it plays at a time
    besides the others.
    """

    def __init__(
        self,
        environment: Environment,
        config: RolloutConfig,
        store: AttemptStore | None = None,
        engine: Interruptible | None = None,
        aside: tuple[Environment, int] | None = None,
    ) -> None:
        self._environment = environment
        self._store = store
        self._engine = engine
        self._slots = asyncio.Semaphore(config.concurrency)
        self._aside, aside_slots = aside or (environment, config.concurrency)
        self._aside_slots = asyncio.Semaphore(aside_slots)
        self._running: dict[AttemptId, Attempt] = {}

    async def group(
        self, prompt: Prompt, group: GroupId, *, size: int, sampling: Sampling, aside: bool = False
    ) -> TrajectoryGroup:
        """Returns `size` attempts at one prompt. The first attempt that fails ends the others, and its exception comes out.

        `aside`: by the servers that are set aside. Sessions are numbered through, from group to group and attempt to attempt,
        which spreads them evenly over the servers.
        """
        ids = [AttemptId(group, number) for number in range(size)]
        try:
            async with asyncio.TaskGroup() as running:
                attempts = [
                    running.create_task(self._attempt(prompt, each, group.number * size + each.number, sampling, aside))
                    for each in ids
                ]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        if self._store is not None:
            await self._store.sync()
        return TrajectoryGroup(prompt, [attempt.result() for attempt in attempts], id=group)

    async def interrupt(self) -> None:
        """Stop sampling and keep all attempts as they are. Cancel the calls of `group` next."""
        if self._engine is not None:
            await self._engine.interrupt()
        if self._store is not None:
            for attempt in self._running.values():
                self._store.note(attempt)
            await self._store.sync()

    def go_on(self) -> None:
        """Sample again after `interrupt`."""
        if self._engine is not None:
            self._engine.go_on()

    async def _attempt(self, prompt: Prompt, number: AttemptId, session: int, sampling: Sampling, aside: bool) -> Trajectory:
        environment, slots = (self._aside, self._aside_slots) if aside else (self._environment, self._slots)
        attempt = environment.begin(prompt, number)
        if self._store is not None:
            kept = await self._store.find(number, prompt, attempt.prompt_ids)
            if isinstance(kept, Trajectory):
                return kept
            attempt = kept or attempt
        async with slots:
            self._running[number] = attempt
            try:
                made = await environment.run(attempt, prompt, session, sampling, self._note)
                if self._store is not None:
                    self._store.note(made)
                return made
            finally:
                del self._running[number]

    def _note(self, attempt: Attempt) -> None:
        if self._store is not None:
            self._store.note(attempt)
