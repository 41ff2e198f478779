"""The endpoint of a run's agents, put together: what listens, whose keys it knows, and how text becomes tokens and calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctpo_megatron.agents.http.keys import KeyedEpisodes
from ctpo_megatron.agents.http.server import AgentServer
from ctpo_megatron.agents.play.environment import Endpoint
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.agents import AgentEndpoint
from ctpo_megatron.engine.sglang.parsers import SGLangCallParser
from ctpo_megatron.rollout.chat import ChatTokenizer


@asynccontextmanager
async def open_endpoint(agent: AgentEndpoint, config: RunConfig, chat: ChatTokenizer) -> AsyncIterator[Endpoint]:
    """The endpoint, which listens within the block. Raises InputError where it cannot listen at its address."""
    episodes, rollout = KeyedEpisodes(), config.rollout
    sampling = {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k, "min_p": rollout.min_p}
    server = AgentServer(
        episodes,
        host=agent.host,
        port=agent.port,
        model=agent.model,
        sampling={name: value for name, value in sampling.items() if value is not None},
    )
    parser = SGLangCallParser(agent.calls, thinks=chat.thinks)
    async with server:
        yield Endpoint(server, episodes, chat, parser, config.data.max_prompt_tokens)
