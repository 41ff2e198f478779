"""An agent's messages in one form, in which equal ones are equal."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ctpo_megatron.agents.protocols import Message, RequestUnusable

ROLES = ("system", "user", "assistant", "tool")
_ALSO = {"developer": "system", "function": "tool"}  # what some clients call them
# what smolagents writes of a call instead of the call; in the user's role it stands between other words
BLOCK = "Calling tools:\n["
_AFTER_BLOCK = re.compile(r"\]\n(?=Observation:|Call id: |Error:)")


def fitted(messages: Sequence[Mapping[str, Any]], known: Collection[str] = ()) -> list[Message]:
    """Returns `messages` with nothing in them that is null or empty but for contents, which are text.

    Results of tools come in the order of the calls that they answer, since most templates write no ids. A text that tells of
    calls, one of the `known` ids among them, becomes a message of its own. Raises RequestUnusable.
    """
    if not messages:
        raise RequestUnusable("messages is empty; at least one is needed")
    made: list[Message] = []
    for place, message in enumerate(messages):
        for each in _unfolded(_fitted(message, f"messages[{place}]"), known):
            block = each["role"] == "user" and each["content"].startswith(BLOCK)
            if block and made and made[-1]["role"] == "assistant" and "tool_calls" not in made[-1]:
                made[-1] = made[-1] | {"content": f"{made[-1]['content']}\n{each['content']}"}
            else:
                made.append(each)
    return _in_order(made)


def _fitted(given: Mapping[str, Any], where: str) -> Message:
    role = _ALSO.get(str(given.get("role")), given.get("role"))
    if role not in ROLES:
        raise RequestUnusable(f"{where}.role is {given.get('role')!r}; allowed: {', '.join(ROLES)}, developer")
    message: Message = {"role": role, "content": _text(given.get("content"), f"{where}.content")}
    if role == "assistant":
        if reasoning := _text(given.get("reasoning_content") or given.get("reasoning"), f"{where}.reasoning_content"):
            message["reasoning_content"] = reasoning
        if calls := given.get("tool_calls"):
            message["tool_calls"] = [_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
    if role == "tool" and given.get("tool_call_id"):
        message["tool_call_id"] = readable(str(given["tool_call_id"]))
    return message


def _text(value: Any, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise RequestUnusable(f"{where} is a {type(value).__name__}; allowed: text or null")
    return readable(value or "")


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestUnusable(f'{where} is no call; needed: {{"id", "type": "function", "function": {{"name", "arguments"}}}}')
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    made = {"id": str(call.get("id") or ""), "type": "function", "function": {"name": function["name"], "arguments": text}}
    return readable(made)


def _unfolded(message: Message, known: Collection[str]) -> list[Message]:
    """A user's message that tells of calls, as the messages that it was made of: what is before, the calls, what is after."""
    text = message["content"]
    if message["role"] != "user" or BLOCK not in text or not any(id_ in text for id_ in known):
        return [message]
    before, _, rest = text.partition(BLOCK)
    end = _AFTER_BLOCK.search(rest)
    block, after = (rest, "") if end is None else (rest[: end.start() + 1], rest[end.end() :])
    made = [message | {"content": before.rstrip("\n")}] if before.strip() else []
    made.append(message | {"content": BLOCK + block})
    return [*made, *(_unfolded(message | {"content": after}, known) if after else [])]


def _in_order(messages: list[Message]) -> list[Message]:
    made: list[Message] = []
    for message in messages:
        if message["role"] != "tool" or not made:
            made.append(message)
            continue
        first = len(made)
        while first and made[first - 1]["role"] == "tool":
            first -= 1
        calls = made[first - 1].get("tool_calls", []) if first else []
        order = {call["id"]: number for number, call in reversed(list(enumerate(calls)))}
        rank = order.get(message.get("tool_call_id", ""), len(calls))
        place = len(made)
        while place > first and order.get(made[place - 1].get("tool_call_id", ""), len(calls)) > rank:
            place -= 1
        made.insert(place, message)
    return made


def readable(value: Any) -> Any:
    """Returns `value`, text or what holds text, with halves of surrogate pairs as characters that cannot be read.

    JSON can hold them, and neither UTF-8 nor a tokenizer. Raises RequestUnusable where it is nested too deeply.
    """
    try:
        return _readable(value)
    except RecursionError:
        raise RequestUnusable("the request is nested too deeply") from None


def _readable(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_readable(key): _readable(each) for key, each in value.items()}
    return [_readable(each) for each in value] if isinstance(value, list | tuple) else value


def words(text: str) -> str:
    """Returns `text` with every run of white space as one space, and none at its ends."""
    return " ".join(_readable(text).split())


def arguments_value(text: str) -> Any:
    """Returns what the arguments of a call say: equal for texts that differ in spacing, escapes, order or forms of numbers.

    What is null, empty text or missing is the same. Text that is no JSON is its words.
    """
    try:
        return _canonical(json.loads(text))
    except (ValueError, RecursionError):
        return words(text)


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        each = {key: _canonical(element) for key, element in value.items()}
        return {key: element for key, element in each.items() if element not in (None, "")}
    if isinstance(value, list):
        return [_canonical(element) for element in value]
    if isinstance(value, str):
        return words(value)
    return value if isinstance(value, bool) or value is None else ("number", _number(value))


def _number(value: float) -> str:
    """A number as JavaScript would have it: all of them are floats."""
    try:
        return repr(float(value))
    except OverflowError:
        return repr(value)


def is_json(text: str) -> bool:
    """Returns whether `text` is JSON of an object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def same(one: Message, other: Message) -> bool:
    """Returns whether two fitted messages, none of which the model wrote here, say the same."""
    return one == other or _said(one) == _said(other)


def _said(message: Message) -> tuple[Any, ...]:
    calls = [(call["function"]["name"], arguments_value(call["function"]["arguments"])) for call in message.get("tool_calls", [])]
    return message["role"], words(message["content"]), calls
