"""Client, environment and rewards put together over running servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config.environments import CodeEnvironment
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.jobs.worlds import world_environment
from ctpo_megatron.record.files import Through, at_once
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.counted import CountedReward, CountedTool
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.protocols import AttemptStore, Environment, Generator, Grader, ToolRunner
from ctpo_megatron.rollout.rewards.opening import open_reward
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.types import Generation


@dataclass(frozen=True)
class OpenRollouts:
    """What samples, the connection to the servers below it, and what compares answers."""

    rollouter: Rollouter
    client: EngineClient
    grader: Grader


@dataclass(frozen=True, slots=True)
class _Aside:
    """The servers of `client` that are set aside, as an engine of their own."""

    client: EngineClient

    async def generate(self, input_ids: list[int], done: Generation, **options: Any) -> Generation:
        """Implement `Generator.generate`."""
        return await self.client.generate(input_ids, done, aside=True, **options)


@asynccontextmanager
async def open_rollouts(
    runtime: Runtime,
    chat: ChatTokenizer,
    tool: ToolRunner | None,
    store: AttemptStore | None = None,
    through: Through = at_once,
) -> AsyncIterator[OpenRollouts]:
    """Sampling from the runtime's servers; connections and judges are closed on leaving.

    `store`: keeps attempts. `through`: how what a judge says is written.
    """
    rollout = runtime.config.rollout
    client = EngineClient(
        runtime.fleet,
        runtime.api_key,
        request_timeout_s=rollout.engine.request_timeout_s,
        routing=runtime.routing,
        top_k=runtime.config.algorithm.top_k,
        traffic=rollout.engine.traffic,
        most=rollout.concurrency,
    )
    async with open_reward(rollout.reward, runtime.run_dir, through) as reward, client:
        counted = None if tool is None else CountedTool(tool, runtime.depths)
        judged = CountedReward(reward, runtime.depths)

        def environment_of(generator: Generator) -> Environment:
            if isinstance(rollout.environment, CodeEnvironment):
                return ToolEnvironment(generator, chat, counted, judged)
            return world_environment(generator, chat, rollout.environment)

        environment = environment_of(client)
        share = runtime.config.eval.servers / rollout.engine.servers
        aside = environment_of(_Aside(client)), max(1, round(share * rollout.concurrency))
        yield OpenRollouts(Rollouter(environment, rollout, store, client, aside), client, reward)
