"""Client, environment and rewards put together over running servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.counted import CountedReward, CountedTool
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.protocols import AttemptStore, ToolRunner
from ctpo_megatron.rollout.rewards import MathReward
from ctpo_megatron.rollout.rollouter import Rollouter


@dataclass(frozen=True)
class OpenRollouts:
    """What samples, and the connection to the servers below it."""

    rollouter: Rollouter
    client: EngineClient


@asynccontextmanager
async def open_rollouts(
    runtime: Runtime, chat: ChatTokenizer, tool: ToolRunner | None, store: AttemptStore | None = None
) -> AsyncIterator[OpenRollouts]:
    """Sampling from the runtime's servers; connections and judges are closed on leaving. `store`: keeps attempts."""
    rollout = runtime.config.rollout
    reward = MathReward(rollout.reward)
    client = EngineClient(
        runtime.fleet,
        runtime.api_key,
        request_timeout_s=rollout.engine.request_timeout_s,
        routing=runtime.routing,
        top_k=runtime.config.algorithm.top_k,
        traffic=rollout.engine.traffic,
        most=rollout.concurrency,
    )
    try:
        async with client:
            counted = None if tool is None else CountedTool(tool, runtime.depths)
            environment = ToolEnvironment(client, chat, counted, CountedReward(reward, runtime.depths))
            yield OpenRollouts(Rollouter(environment, rollout, store, client), client)
    finally:
        reward.close()
