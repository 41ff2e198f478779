"""Anthropic's client with a loop of one's own."""

from __future__ import annotations

from anthropic import Anthropic
from anthropic.types import Message

from ctpo_megatron.agents.play.task import AgentTask

MOST_TURNS, MOST_TOKENS = 5, 1024
NUMBERS = {"a": {"type": "number"}, "b": {"type": "number"}}
ADD = {
    "name": "add",
    "description": "Adds two numbers.",
    "input_schema": {"type": "object", "properties": NUMBERS, "required": ["a", "b"]},
}


def play(task: AgentTask, *, stream: bool = False) -> str:
    """Returns the model's answer."""
    messages = list(task.messages)
    with Anthropic(base_url=task.anthropic_url, api_key=task.api_key) as client:
        for _ in range(MOST_TURNS):
            said = _asked(client, task.model, messages, stream)
            messages.append({"role": "assistant", "content": said.content})
            calls = [block for block in said.content if block.type == "tool_use"]
            if not calls:
                return "".join(block.text for block in said.content if block.type == "text")
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": str(call.input["a"] + call.input["b"])}
                for call in calls
            ]
            messages.append({"role": "user", "content": results})
    raise RuntimeError(f"no answer after {MOST_TURNS} turns")


def _asked(client: Anthropic, model: str, messages: list, stream: bool) -> Message:
    asked = {"model": model, "messages": messages, "tools": [ADD], "max_tokens": MOST_TOKENS}
    if not stream:
        return client.messages.create(**asked)
    with client.messages.stream(**asked) as events:
        return events.get_final_message()
