"""Groups of trajectories, a bounded number of them in flight, none of which is lost when the run is interrupted."""

from __future__ import annotations

import asyncio

from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.errors import AsideLost, EngineRefused, InputError, NoServerLeft, RolloutError, StorageError
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.protocols import AttemptStore, Environment, Interruptible, JudgesGroups, Sampling
from ctpo_megatron.types import AttemptId, FailedAttempt, GroupId, Prompt, Trajectory, TrajectoryGroup

RETRY_PAUSE_S = 0.2  # before the first retry of an attempt; as much more before each one after it
# what is the run's and not the attempt's: another try, or another prompt, would end in the same way
ENDS_THE_RUN = (InputError, StorageError, EngineRefused, NoServerLeft, AsideLost)


class _AttemptFailed(Exception):
    """An attempt failed once more than it is tried again; `cause` is the newest error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.cause = cause


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
        self._retries = config.retries
        self._store = store
        self._engine = engine
        self._slots = asyncio.Semaphore(config.concurrency)
        self._aside, aside_slots = aside or (environment, config.concurrency)
        self._aside_slots = asyncio.Semaphore(aside_slots)
        self._running: dict[AttemptId, Attempt] = {}

    async def group(
        self,
        prompt: Prompt,
        group: GroupId,
        *,
        size: int,
        sampling: Sampling,
        aside: bool = False,
        keep_failed: bool = False,
    ) -> TrajectoryGroup:
        """Returns `size` attempts at one prompt. An attempt that fails is tried again, `config.retries` times.

        The first that fails once more ends the others. With `keep_failed` all of them are in `TrajectoryGroup.failed` then, and
        otherwise its exception comes out; so does what is not the attempt's own fault (`ENDS_THE_RUN`). `aside`: by the servers
        that are set aside. Sessions are numbered through, from group to group and attempt to attempt, which spreads them evenly
        over the servers.
        """
        ids = [AttemptId(group, number) for number in range(size)]
        begun = {each: self._environment.begin(prompt, each) for each in ids}
        tasks: list[asyncio.Task[Trajectory]] = []
        try:
            async with asyncio.TaskGroup() as running:
                for each in ids:
                    attempt = self._attempt(begun, prompt, each, group.number * size + each.number, sampling, aside)
                    tasks.append(running.create_task(attempt))
        except ExceptionGroup as failures:
            error = next((each for each in failures.exceptions if not isinstance(each, _AttemptFailed)), failures.exceptions[0])
            if not isinstance(error, _AttemptFailed):
                raise error from failures
            if not keep_failed:
                raise error.cause from failures
        if self._store is not None:
            await self._store.sync()
        if any(task.cancelled() or task.exception() for task in tasks):
            failed = [_of_failed_group(begun[each], task) for each, task in zip(ids, tasks, strict=True)]
            return TrajectoryGroup(prompt, [], id=group, failed=failed)
        made = [task.result() for task in tasks]
        try:
            judged = await self._judged(self._aside if aside else self._environment, prompt, made)
        except _AttemptFailed as error:
            if not keep_failed:
                raise error.cause from error
            failed = [FailedAttempt(each.id, str(error), False, each.response_length, each.reward) for each in made]
            return TrajectoryGroup(prompt, [], id=group, failed=failed)
        return TrajectoryGroup(prompt, judged, id=group)

    async def _judged(self, environment: Environment, prompt: Prompt, made: list[Trajectory]) -> list[Trajectory]:
        """Returns a whole group as its environment judges it together, where it does. Raises _AttemptFailed."""
        if not isinstance(environment, JudgesGroups):
            return made
        for number in range(1, self._retries + 2):
            try:
                return await environment.judge(prompt, made)
            except ENDS_THE_RUN:
                raise
            except Exception as error:
                if number > self._retries:
                    raise _AttemptFailed(error) from error
            await asyncio.sleep(RETRY_PAUSE_S * number)
        raise AssertionError("the last try returns or raises")

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

    async def _attempt(
        self, begun: dict[AttemptId, Attempt], prompt: Prompt, number: AttemptId, session: int, sampling: Sampling, aside: bool
    ) -> Trajectory:
        """Returns the attempt `number` of those that were `begun`, played to its end, which may be in the store already."""
        environment, slots = (self._aside, self._aside_slots) if aside else (self._environment, self._slots)
        if self._store is not None:
            kept = await self._store.find(number, prompt, begun[number].prompt_ids)
            if isinstance(kept, Trajectory):
                return kept
            begun[number] = kept or begun[number]
        async with slots:
            attempt = self._running[number] = begun[number]
            try:
                made = await self._tried(environment, attempt, prompt, session, sampling)
                if self._store is not None:
                    self._store.note(made)
                return made
            finally:
                del self._running[number]

    async def _tried(
        self, environment: Environment, attempt: Attempt, prompt: Prompt, session: int, sampling: Sampling
    ) -> Trajectory:
        """Play `attempt`; where that fails, go on from what it holds. Raises _AttemptFailed."""
        tries = self._retries + 1
        for number in range(1, tries + 1):
            try:
                return await environment.run(attempt, prompt, session, sampling, self._note)
            except ENDS_THE_RUN:
                raise
            except Exception as error:
                if number == tries:
                    raise _AttemptFailed(error) from error
                if isinstance(error, RolloutError):  # what the engine gave may be what is wrong
                    attempt.open = None
            await asyncio.sleep(RETRY_PAUSE_S * number)
        raise AssertionError("the last try returns or raises")

    def _note(self, attempt: Attempt) -> None:
        if self._store is not None:
            self._store.note(attempt)


def _of_failed_group(attempt: Attempt, task: asyncio.Task[Trajectory]) -> FailedAttempt:
    """Returns an attempt whose `task` failed, or is of no use because another one's did."""
    length = attempt.response_length + (len(attempt.open.token_ids) if attempt.open else 0)
    if not task.cancelled() and (error := task.exception()) is not None:
        return FailedAttempt(attempt.id, str(error), False, length)
    made = None if task.cancelled() else task.result()
    length = length if made is None else made.response_length
    return FailedAttempt(attempt.id, "another attempt of its group failed", True, length, None if made is None else made.reward)
