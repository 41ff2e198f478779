"""How clients send a turn back: what their packages were seen to do with it, each as a function of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ctpo_megatron.agents.protocols import AgentAnswer, Message
from tests.support.agents import echo

Mangle = Callable[[AgentAnswer], list[Message]]


def _with_arguments(answer: AgentAnswer, change: Callable[[Any], str]) -> list[Message]:
    message = echo(answer)
    for call in message.get("tool_calls", []):
        call["function"]["arguments"] = change(json.loads(call["function"]["arguments"]))
    return [message]


def _floats(value: Any) -> Any:
    """Numbers as a language without integers has them."""
    if isinstance(value, dict):
        return {key: _floats(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_floats(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _with_nulls(value: Any) -> Any:
    return value | {"unset": None, "empty": ""} if isinstance(value, dict) else value


def _less_reasoning(answer: AgentAnswer) -> Message:
    return {key: value for key, value in echo(answer).items() if key != "reasoning_content"}


def _inline(answer: AgentAnswer, opening: str, closing: str) -> list[Message]:
    message = _less_reasoning(answer)
    if answer.reasoning is not None:
        message["content"] = f"{opening}{answer.reasoning}{closing}{answer.content or ''}"
    return [message]


def _behind(answer: AgentAnswer) -> list[Message]:
    message = _less_reasoning(answer)
    if answer.reasoning is not None:
        message["content"] = f"{answer.content or ''}\n\n<think>\n{answer.reasoning}\n</think>"
    return [message]


def _other_ids(answer: AgentAnswer) -> list[Message]:
    message = echo(answer)
    for number, call in enumerate(message.get("tool_calls", [])):
        call["id"] = f"theirs_{number}"
    return [message]


def _missing_content(answer: AgentAnswer) -> list[Message]:
    message = echo(answer)
    if not message["content"]:
        del message["content"]
    return [message]


def _block(answer: AgentAnswer) -> str:
    calls = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in answer.calls]
    return f"Calling tools:\n{calls}"


def _as_text(answer: AgentAnswer) -> list[Message]:
    """Stripped, and calls as text in the assistant's role."""
    said = [(answer.content or "").strip(), *([_block(answer)] if answer.calls else [])]
    return [{"role": "assistant", "content": "\n".join(filter(None, said))}]


def _as_users_text(answer: AgentAnswer) -> list[Message]:
    """Calls as text in the user's role."""
    words = (answer.content or "").strip()
    if not answer.calls:
        return [{"role": "assistant", "content": words}]
    said = [{"role": "assistant", "content": words}] if words else []
    return [*said, {"role": "user", "content": _block(answer)}]


def _as_code(answer: AgentAnswer) -> list[Message]:
    """A closing tag that the model did not write, and a call that was made of its text."""
    if answer.calls:
        return [echo(answer)]
    block = "Calling tools:\n[{'id': 'call_1', 'type': 'function', 'function': {'name': 'python_interpreter'}}]"
    return [{"role": "assistant", "content": f"{(answer.content or '').strip()}</code>\n{block}"}]


MANGLES: dict[str, Mangle] = {
    "verbatim": lambda answer: [echo(answer)],
    "null is empty": lambda answer: [echo(answer) | {"content": answer.content or ""}],
    "no content": _missing_content,
    "stripped": lambda answer: [echo(answer) | {"content": (answer.content or "").strip() or None}],
    "arguments written anew": lambda answer: _with_arguments(answer, lambda v: json.dumps(v, separators=(",", ":"))),
    "arguments in another order": lambda answer: _with_arguments(
        answer, lambda v: json.dumps(dict(reversed(v.items())), ensure_ascii=False, indent=1)
    ),
    "other forms of numbers": lambda answer: _with_arguments(answer, lambda v: json.dumps(_floats(v))),
    "nulls that were not there": lambda answer: _with_arguments(answer, lambda v: json.dumps(_with_nulls(v))),
    "other ids": _other_ids,
    "no reasoning": lambda answer: [_less_reasoning(answer)],
    "reasoning inline": lambda answer: _inline(answer, "<think>\n", "\n</think>\n\n"),
    "reasoning in other tags": lambda answer: _inline(answer, '<reasoning signature="x y">', "</reasoning>"),
    "reasoning without its opening": lambda answer: _inline(answer, "", "</think>"),
    "reasoning behind": _behind,
    "reasoning by its other name": lambda answer: [_less_reasoning(answer) | {"reasoning": answer.reasoning}],
    "as text": _as_text,
    "as the user's text": _as_users_text,
    "as code": _as_code,
}
