"""pydantic-ai, through its client of OpenAI's interface or that of Anthropic's.

A stream is read by a handler: `run_stream` takes the first text for the answer, also where a call follows it.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

from ctpo_megatron.agents.play.task import AgentTask

agent = Agent(system_prompt="Be brief.")


@agent.tool_plain
def add(a: float, b: float) -> float:
    """Adds two numbers."""
    return a + b


async def play(task: AgentTask, *, stream: bool = False) -> str:
    """Returns the agent's answer, asked for through OpenAI's interface."""
    provider = OpenAIProvider(base_url=task.openai_url, api_key=task.api_key)
    return await _played(OpenAIChatModel(task.model, provider=provider), task.question, stream)


async def play_anthropic(task: AgentTask, *, stream: bool = False) -> str:
    """Returns the agent's answer, asked for through Anthropic's interface."""
    provider = AnthropicProvider(base_url=task.anthropic_url, api_key=task.api_key)
    return await _played(AnthropicModel(task.model, provider=provider), task.question, stream)


async def _played(model: Model, question: str, stream: bool) -> str:
    done = await agent.run(question, model=model, event_stream_handler=_read if stream else None)
    return done.output


async def _read(_context: Any, events: AsyncIterable[Any]) -> None:
    async for _event in events:
        pass
