"""Client, environment and rewards put together over running servers; where agents play, their endpoint and processes too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpo_megatron.agents.play.counted import CountedRunner
from ctpo_megatron.agents.play.environment import AgentEnvironment
from ctpo_megatron.agents.play.kinds import check_agent, make_runner, started_here
from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config.environments import CodeEnvironment
from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.jobs.endpoint import open_endpoint
from ctpo_megatron.jobs.worlds import world_environment
from ctpo_megatron.record.files import Through, at_once
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.counted import CountedReward, CountedTool
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.protocols import AttemptStore, Environment, Grader, Reward, ToolRunner
from ctpo_megatron.rollout.rewards.opening import open_reward
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.rollout.tools import make_tool
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


def checked_tool(config: RolloutConfig) -> ToolRunner | None:
    """What executes the model's code; None where there is none. Raises ConfigError, also where agents could not be started."""
    check_agent(config.agent)
    return make_tool(config.code_tool)


def open_client(runtime: Runtime) -> EngineClient:
    """What generates on all servers of `runtime`, once its block is entered."""
    rollout = runtime.config.rollout
    return EngineClient(
        runtime.fleet,
        runtime.api_key,
        request_timeout_s=rollout.engine.request_timeout_s,
        routing=runtime.routing,
        top_k=runtime.config.algorithm.top_k,
        traffic=rollout.engine.traffic,
        most=rollout.concurrency,
    )


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
    async with open_reward(rollout.reward, runtime.run_dir, through) as reward, open_client(runtime) as client:
        judged = CountedReward(reward, runtime.depths)
        async with _environments(runtime, chat, client, tool, judged) as (ours, of_aside):
            share = runtime.config.eval.servers / rollout.engine.servers
            aside = of_aside, max(1, round(share * rollout.concurrency))
            yield OpenRollouts(Rollouter(ours, rollout, store, client, aside), client, reward)


@asynccontextmanager
async def _environments(
    runtime: Runtime, chat: ChatTokenizer, client: EngineClient, tool: ToolRunner | None, reward: Reward
) -> AsyncIterator[tuple[Environment, Environment]]:
    """What plays attempts, on all servers, and on those that are set aside."""
    generators, config = (client, _Aside(client)), runtime.config
    agent, environment = started_here(config.rollout.agent), config.rollout.environment
    if not isinstance(environment, CodeEnvironment):
        worlds = [world_environment(each, chat, environment) for each in generators]
        yield worlds[0], worlds[1]
        return
    if agent is None:
        counted = None if tool is None else CountedTool(tool, runtime.depths)
        with_tool = [ToolEnvironment(each, chat, counted, reward) for each in generators]
        yield with_tool[0], with_tool[1]
        return
    runner = CountedRunner(make_runner(agent, Path(config.run_dir) / "logs"), runtime.depths)
    async with open_endpoint(agent, config, chat) as endpoint:
        try:
            played = [AgentEnvironment(endpoint, each, runner, reward, agent) for each in generators]
            yield played[0], played[1]
        finally:
            await runner.close()
