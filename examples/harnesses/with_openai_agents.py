"""openai-agents. It asks for responses by default, so it is given a model of chat completions."""

from __future__ import annotations

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

from ctpo_megatron.agents.play.task import AgentTask

set_tracing_disabled(True)


@function_tool
def add(a: float, b: float) -> float:
    """Adds two numbers."""
    return a + b


async def play(task: AgentTask, *, stream: bool = False) -> str:
    """Returns the agent's answer."""
    async with AsyncOpenAI(base_url=task.openai_url, api_key=task.api_key) as client:
        model = OpenAIChatCompletionsModel(task.model, client)
        agent = Agent("adder", instructions="Be brief.", tools=[add], model=model)
        if not stream:
            return str((await Runner.run(agent, task.question)).final_output)
        run = Runner.run_streamed(agent, task.question)
        async for _event in run.stream_events():
            pass
        return str(run.final_output)
