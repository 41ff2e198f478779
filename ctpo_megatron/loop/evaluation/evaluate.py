"""One policy on some benchmarks, through the inference servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ctpo_megatron.config.evaluation import HELD_OUT, BenchmarkSettings
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.loop.evaluation.results import BenchmarkResult, Evaluation, Problem
from ctpo_megatron.loop.evaluation.votes import count_votes
from ctpo_megatron.loop.protocols import Rollouts
from ctpo_megatron.rollout.protocols import Grader, Sampling
from ctpo_megatron.types import GroupId, Prompt, Trajectory

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark with its problems."""

    settings: BenchmarkSettings
    prompts: Sequence[Prompt]  # all rows of its file

    @property
    def chosen(self) -> Sequence[Prompt]:
        """Returns the rows that are used."""
        return self.prompts[: self.settings.prompts]

    @property
    def sampling(self) -> Sampling:
        """Returns how its attempts are sampled."""
        settings = self.settings
        return Sampling(settings.temperature, settings.max_turns, settings.max_response_tokens)

    @property
    def key(self) -> str:
        """Returns its name in the ids of groups (`GroupId.benchmark`)."""
        return "" if self.settings.name == HELD_OUT else self.settings.name


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates what the servers hold. `seed`: of the bootstrap."""

    rollouts: Rollouts
    grader: Grader
    seed: int

    async def evaluate(
        self, benchmarks: Sequence[Benchmark], *, step: int, whole: bool = True, aside: bool = False
    ) -> Evaluation:
        """Returns what comes out of all attempts at all `benchmarks` by version `step` of the weights.

        `whole`: whether these are all benchmarks. `aside`: by the servers that are set aside. Raises RolloutError where another
        version has sampled a token: weights that are mixed are not evaluated.
        """
        begun = time.monotonic()
        results = await _all(self._benchmark(each, step, aside) for each in benchmarks)
        return Evaluation(results, whole, time.monotonic() - begun)

    async def _benchmark(self, benchmark: Benchmark, step: int, aside: bool) -> BenchmarkResult:
        settings, sampling = benchmark.settings, benchmark.sampling

        async def attempt(number: int, prompt: Prompt) -> Problem:
            name = GroupId(number, evaluation=step, benchmark=benchmark.key)
            group = await self.rollouts.group(prompt, name, size=settings.samples, sampling=sampling, aside=aside)
            for trajectory in group.trajectories:
                _check_version(trajectory, step)
            return Problem(group, await count_votes(group.trajectories, self.grader))

        problems = await _all(attempt(number, prompt) for number, prompt in enumerate(benchmark.chosen))
        return await asyncio.to_thread(BenchmarkResult.of, settings, step, problems, self.seed)


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns what all of `work` gives. The first failure ends the others, and comes out as it is."""
    try:
        async with asyncio.TaskGroup() as running:
            tasks = [running.create_task(each) for each in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]


def _check_version(trajectory: Trajectory, version: int) -> None:
    found = {each for turn in trajectory.all_turns if turn.role == "assistant" for each in turn.versions}
    if found - {version}:
        raise RolloutError(
            f"{trajectory.id}: version {version} of the weights is evaluated, but tokens of it were sampled by version "
            f"{', '.join(map(str, sorted(found - {version})))}; nothing of this evaluation is used"
        )
