"""An agent of OpenAI's SDK, as one would write it for any model: it solves a word problem with a calculator.

`configs/quickstart_agent.yaml` has it played, and trained. Nothing in it knows of training: it is given an address and a key.
"""

from __future__ import annotations

import operator
import re

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

from ctpo_megatron.agents.play.task import AgentTask

OPERATIONS = {"*": operator.mul, "+": operator.add, "%": operator.mod, "-": operator.sub}

set_tracing_disabled(True)


@function_tool
def calculate(expression: str) -> str:
    """Compute two whole numbers, such as `12*34`; allowed are * + - and %."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*([*+%-])\s*(\d{1,9})\s*", expression)
    if found is None or (found[2] == "%" and not int(found[3])):
        return "error: not two whole numbers and one of * + - %"
    return str(OPERATIONS[found[2]](int(found[1]), int(found[3])))


async def play(task: AgentTask) -> str:
    """Returns the agent's answer."""
    async with AsyncOpenAI(base_url=task.openai_url, api_key=task.api_key) as client:
        agent = Agent("solver", tools=[calculate], model=OpenAIChatCompletionsModel(task.model, client))
        done = await Runner.run(agent, task.question, max_turns=3)
    return str(done.final_output)
