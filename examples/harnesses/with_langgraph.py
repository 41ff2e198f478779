"""langgraph, with the agent that langchain builds on it."""

from __future__ import annotations

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI

from ctpo_megatron.agents.play.task import AgentTask


def add(a: float, b: float) -> float:
    """Adds two numbers."""
    return a + b


async def play(task: AgentTask, *, stream: bool = False) -> str:
    """Returns the agent's answer. Raises ValueError at a call that is no JSON, where a graph ends and says nothing."""
    model = ChatOpenAI(model=task.model, base_url=task.openai_url, api_key=task.api_key, streaming=stream)
    agent = create_agent(model, [add], system_prompt="Be brief.")
    last = (await agent.ainvoke({"messages": task.messages}))["messages"][-1]
    if last.invalid_tool_calls:
        raise ValueError(f"the model's call cannot be used: {last.invalid_tool_calls}")
    return last.text
