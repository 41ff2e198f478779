"""Anthropic's messages as harnesses write them, in the one form that conversations know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ctpo_megatron.agents.http.openai_messages import not_text
from ctpo_megatron.agents.http.refusals import Refusal, shown
from ctpo_megatron.agents.protocols import Message


def read_history(system: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Returns the messages in the form of `AgentRequest`, `system` first. Raises Refusal, which names the place.

    Results of tools become messages of their own, before the text that stands beside them. Thinking is an assistant's reasoning;
    thinking that was encrypted elsewhere cannot be read and is refused.
    """
    made: list[Message] = []
    if system:
        made.append({"role": "system", "content": _text(system, "system")})
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        role = message.get("role")
        if role == "assistant":
            made.append(_assistant(message.get("content"), where))
        elif role == "user":
            made += _user(message.get("content"), where)
        elif role == "system":
            made.append({"role": "system", "content": _text(message.get("content"), where)})
        else:
            raise Refusal(f"{where}.role is one of user, assistant, system, not {shown(role)}")
    return tuple(made)


def _user(content: Any, where: str) -> list[Message]:
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[Message] = []
    texts = []
    for number, block in enumerate(_blocks(content, where)):
        if block.get("type") == "tool_result":
            inside = f"{where}.content[{number}]"
            called = block.get("tool_use_id")
            if not isinstance(called, str):
                raise Refusal(f"{inside}.tool_use_id is text, not {shown(called)}")
            results.append({"role": "tool", "content": _text(block.get("content"), inside), "tool_call_id": called})
        else:
            texts.append(_text([block], where, number))
    text = "".join(texts)
    return [*results, {"role": "user", "content": text}] if text or not results else results


def _assistant(content: Any, where: str) -> Message:
    if isinstance(content, str):
        return {"role": "assistant", "content": content or None}
    texts, thoughts, calls = [], [], []
    for number, block in enumerate(_blocks(content, where)):
        kind = block.get("type")
        if kind == "thinking" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind == "tool_use":
            calls.append(_call(block, f"{where}.content[{number}]"))
        else:
            texts.append(_text([block], where, number))
    made: Message = {"role": "assistant", "content": "".join(texts) or None}
    if any(thoughts):
        made["reasoning_content"] = "".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    return made


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    called, name = block.get("id"), block.get("name")
    if not isinstance(called, str) or not isinstance(name, str):
        raise Refusal(f"{where} is a tool_use with id, name and input, not {shown(block)}")
    arguments = msgspec.json.encode(block.get("input") or {}).decode()
    return {"id": called, "type": "function", "function": {"name": name, "arguments": arguments}}


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(content, list):
        raise Refusal(f"{where}.content is text or a list of blocks, not {shown(content)}")
    for number, block in enumerate(content):
        if not isinstance(block, dict):
            raise Refusal(f"{where}.content[{number}] is an object with a type, not {shown(block)}")
    return content


def _text(content: Any, where: str, first: int = 0) -> str:
    """The text of blocks, joined; `first`: the number of the first of them."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, block in enumerate(_blocks(content, where)):
        if block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise Refusal(f"{where}.content[{first + number}]: {not_text(block.get('type'))}")
        texts.append(block["text"])
    return "".join(texts)


def read_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Returns the tools on offer in the form of `AgentRequest`. Raises Refusal."""
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise Refusal(f"tools is a list, not {shown(tools)}")
    made = []
    for place, tool in enumerate(tools):
        own = isinstance(tool, dict) and tool.get("type") in (None, "custom") and isinstance(tool.get("name"), str)
        if not own:
            raise Refusal(
                f"tools[{place}] has a name, a description and an input_schema of its own, not {shown(tool)}; tools that are "
                "known by a type, or run by a service, do not exist here"
            )
        function = {"name": tool["name"], "description": tool.get("description"), "parameters": tool.get("input_schema")}
        kept = {key: value for key, value in function.items() if value is not None}
        made.append({"type": "function", "function": kept})
    return tuple(made)
