"""litellm with a loop of one's own.

Its import asks the internet for prices, unless LITELLM_LOCAL_MODEL_COST_MAP=True is in `rollout.agent.env`.
"""

from __future__ import annotations

import json
from typing import Any

import litellm

from ctpo_megatron.agents.play.task import AgentTask

MOST_TURNS = 5
NUMBERS = {"a": {"type": "number"}, "b": {"type": "number"}}
PARAMETERS = {"type": "object", "properties": NUMBERS, "required": ["a", "b"]}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds two numbers.", "parameters": PARAMETERS}}


def play(task: AgentTask, *, stream: bool = False) -> str:
    """Returns the model's answer."""
    messages = list(task.messages)
    for _ in range(MOST_TURNS):
        said = _asked(task, messages, stream)
        messages.append(said.model_dump())
        if not said.tool_calls:
            return said.content or ""
        for call in said.tool_calls:
            numbers = json.loads(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(numbers["a"] + numbers["b"])})
    raise RuntimeError(f"no answer after {MOST_TURNS} turns")


def _asked(task: AgentTask, messages: list[Any], stream: bool) -> Any:
    where = {"api_base": task.openai_url, "api_key": task.api_key}
    answer = litellm.completion(model=f"openai/{task.model}", messages=messages, tools=[ADD], stream=stream, **where)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=messages)
    return answer.choices[0].message
