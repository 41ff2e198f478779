"""OpenAI's messages as harnesses write them, in the one form that conversations know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ctpo_megatron.agents.http.refusals import Refusal, shown
from ctpo_megatron.agents.protocols import Message

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
_TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}  # kind of part: where its text is
_THOUGHTS = {"thinking": "thinking", "reasoning": "text"}


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Returns the messages in the form of `AgentRequest`. Raises Refusal, which names the place.

    Parts of text are joined; the role developer is system; an assistant's function_call is a tool call, and the role function
    answers it. Missing, null and empty content of an assistant are null, of others an empty text. Keys that templates do not
    know, such as those that a client kept of an answer, are left out.
    """
    made: list[Message] = []
    called = ""  # id of the last call in the old style
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        named = message.get("role")
        role = ROLES.get(named) if isinstance(named, str) else None
        if role is None:
            raise Refusal(f"{where}.role is one of {', '.join(ROLES)}, not {shown(named)}")
        if role == "assistant":
            call = message.get("function_call")
            if call:
                called = f"call_function_{place}"
            made.append(_assistant(message, where, called))
        elif role == "tool":
            made.append(_tool(message, where, called if named == "function" else None))
        else:
            made.append({"role": role, "content": text_of(message.get("content"), where) or ""})
    return tuple(made)


def _assistant(message: Mapping[str, Any], where: str, called: str) -> Message:
    if message.get("audio"):
        raise Refusal(f"{where}.audio: only text is understood")
    thoughts: list[str] = []
    content = text_of(message.get("content"), where, thoughts) or text_of(message.get("refusal"), where)
    made: Message = {"role": "assistant", "content": content or None}
    reasoning = message.get("reasoning_content") or message.get("reasoning") or "".join(thoughts)
    if isinstance(reasoning, str) and reasoning:
        made["reasoning_content"] = reasoning
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise Refusal(f"{where}.tool_calls is a list, not {shown(calls)}")
    if message.get("function_call"):
        calls = [{"id": called, "function": message["function_call"]}, *calls]
    if calls:
        made["tool_calls"] = [_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)]
    return made


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") not in ("function", None):
        raise Refusal(f"{where} is a call of a function ({{'id', 'type': 'function', 'function'}}), not {shown(call)}")
    name = function.get("name")
    if not isinstance(name, str):
        raise Refusal(f"{where}.function.name is text, not {shown(name)}")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):  # some clients parse them and forget to write them again
        arguments = "" if arguments is None else msgspec.json.encode(arguments).decode()
    return {"id": _text(call.get("id"), f"{where}.id"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _tool(message: Mapping[str, Any], where: str, called: str | None) -> Message:
    given = called if called is not None else _text(message.get("tool_call_id"), f"{where}.tool_call_id")
    return {"role": "tool", "content": text_of(message.get("content"), where) or "", "tool_call_id": given}


def _text(value: Any, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise Refusal(f"{where} is text, not {shown(value)}")
    return value or ""


def text_of(content: Any, where: str, thoughts: list[str] | None = None) -> str | None:
    """Returns the text of a message's content, its parts joined; null where there is none. Raises Refusal.

    `thoughts`: takes the parts that are an assistant's reasoning.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(f"{where}.content is text or a list of parts, not {shown(content)}")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        kind = kind if isinstance(kind, str) else ""
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXTS and isinstance(part.get(_TEXTS[kind]), str):
            texts.append(part[_TEXTS[kind]])
        elif thoughts is not None and kind in _THOUGHTS and isinstance(part.get(_THOUGHTS[kind]), str):
            thoughts.append(part[_THOUGHTS[kind]])
        else:
            raise Refusal(f"{where}.content[{number}]: {not_text(kind or part)}")
    return "".join(texts)


def not_text(kind: Any) -> str:
    """Returns why a part of this kind is refused."""
    return f"the model that is trained reads text only, so a part of the type {shown(kind)} would not reach it; send text"


def read_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Returns the tools on offer in the form of `AgentRequest`. Raises Refusal."""
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise Refusal(f"tools is a list, not {shown(tools)}")
    made = []
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function" or not isinstance(function.get("name"), str):
            raise Refusal(
                f"tools[{place}] is a function, {{'type': 'function', 'function': {{'name', 'description', 'parameters'}}}}, "
                f"not {shown(tool)}; tools that a service runs itself do not exist here"
            )
        kept = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
        made.append({"type": "function", "function": kept})
    return tuple(made)
