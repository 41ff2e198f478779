"""OpenAI's client with a loop of one's own. What the model says goes back as it came."""

from __future__ import annotations

import json

from openai import OpenAI
from openai.types.chat import ChatCompletionMessage

from ctpo_megatron.agents.play.task import AgentTask

MOST_TURNS = 5
NUMBERS = {"a": {"type": "number"}, "b": {"type": "number"}}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "strict": True,  # without it the client's streams take no tools
        "parameters": {"type": "object", "properties": NUMBERS, "required": ["a", "b"], "additionalProperties": False},
    },
}


def play(task: AgentTask, *, stream: bool = False) -> str:
    """Returns the model's answer."""
    messages = list(task.messages)
    with OpenAI(base_url=task.openai_url, api_key=task.api_key) as client:
        for _ in range(MOST_TURNS):
            said = _asked(client, task.model, messages, stream)
            messages.append(said.to_dict())
            if not said.tool_calls:
                return said.content or ""
            for call in said.tool_calls:
                numbers = json.loads(call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": str(numbers["a"] + numbers["b"])})
    raise RuntimeError(f"no answer after {MOST_TURNS} turns")


def _asked(client: OpenAI, model: str, messages: list, stream: bool) -> ChatCompletionMessage:
    if not stream:
        return client.chat.completions.create(model=model, messages=messages, tools=[ADD]).choices[0].message
    with client.chat.completions.stream(model=model, messages=messages, tools=[ADD]) as events:
        return events.get_final_completion().choices[0].message
