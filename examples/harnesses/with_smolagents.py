"""smolagents: an agent that calls tools, and one that writes Python.

The second one's code runs in smolagents' own interpreter, in this process. That is no sandbox: confine the process.
"""

from __future__ import annotations

from smolagents import CodeAgent, LogLevel, OpenAIModel, ToolCallingAgent, tool

from ctpo_megatron.agents.play.task import AgentTask

MOST_STEPS = 5


@tool
def add(a: float, b: float) -> float:
    """Adds two numbers.

    Args:
        a: the first one
        b: the second one
    """
    return a + b


def play(task: AgentTask, *, stream: bool = False, kind: type[ToolCallingAgent | CodeAgent] = ToolCallingAgent) -> str:
    """Returns what the agent gives as its final answer."""
    model = OpenAIModel(task.model, api_base=task.openai_url, api_key=task.api_key)
    agent = kind([add], model, max_steps=MOST_STEPS, stream_outputs=stream, verbosity_level=LogLevel.OFF)
    return str(agent.run(task.question))


def play_code(task: AgentTask, *, stream: bool = False) -> str:
    """Returns what the code that the model wrote gives as its final answer."""
    return play(task, stream=stream, kind=CodeAgent)
