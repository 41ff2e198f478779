"""Whether a message of a history is a turn that was sampled, in whatever form its client sends it back.

By the ids of its calls first, which are given out once; then by names and parsed arguments of its calls; then by its words. Where
something is said otherwise than the model said it, the turn was rewritten, and the message is no echo.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ctpo_megatron.agents.conversation.messages import BLOCK, arguments_value, is_json, words
from ctpo_megatron.agents.protocols import Message, ToolCall

_TAG = re.compile(r"\s*(<[^<>]*>|\[/?\w+\])\s*")
_THOUGHT_TAG = re.compile(r"\s*(<[^<>]*(think|thought|reason|reflect|analys)[^<>]*>|\[/?THINK\])\s*", re.IGNORECASE)
_CLOSING = re.compile(r"\s*(</\w+>|<end_\w+>|```)\s*")  # that smolagents adds where the model wrote none
_BLOCK = words(BLOCK)


def echoes(content: str, reasoning: str, calls: Sequence[ToolCall], message: Message) -> bool:
    """Returns whether `message`, in its fitted form, is the turn of this content, reasoning and calls."""
    said, given = words(message["content"]), message.get("tool_calls", [])
    if message["role"] == "user":
        return said.startswith(_BLOCK) and not content.strip() and _tells(said, calls)
    if message["role"] != "assistant":
        return False
    apart = words(message.get("reasoning_content", ""))
    if apart not in ("", words(reasoning)):
        return False
    said = _less_reasoning(said, words(content), words(reasoning))
    if given:
        return _same_calls(calls, message) and (not said or said == words(content))
    if not said.startswith(words(content)):
        return False
    added = said[len(words(content)) :]
    if not added:
        return not calls
    if closing := _CLOSING.match(added):
        added = added[closing.end() :]
    added = added.strip()
    return not calls if not added else added.startswith(_BLOCK) and _tells(added, calls)


def _same_calls(calls: Sequence[ToolCall], message: Message) -> bool:
    given = message["tool_calls"]
    if len(given) != len(calls):
        return False
    by_id = {call["id"]: call["function"] for call in given}
    known = len(by_id) == len(calls) and all(call.id in by_id for call in calls)
    pairs = [by_id[call.id] for call in calls] if known else [call["function"] for call in given]
    for call, function in zip(calls, pairs, strict=True):
        broken = known and not is_json(call.arguments)  # some clients make another object of what is no JSON
        if function["name"] != call.name:
            return False
        if not broken and arguments_value(function["arguments"]) != arguments_value(call.arguments):
            return False
    return True


def _tells(block: str, calls: Sequence[ToolCall]) -> bool:
    """Whether the text of calls that a client wrote is of these `calls`; of a turn without any it is made of the content."""
    return block.endswith("]") and all(call.id in block and call.name in block for call in calls)


def _less_reasoning(said: str, content: str, reasoning: str) -> str:
    """`said` without the reasoning, where it stands before the content or behind it, in any tags or none."""
    if said == content:
        return said
    before = _less_start(said, reasoning)
    if before is not None and before.startswith(content):
        return before
    behind = _less_start(said[len(content) :], reasoning) if reasoning and said.startswith(content) else None
    return content if behind == "" else said


def _less_start(text: str, reasoning: str) -> str | None:
    """What follows the reasoning that `text` begins with, in tags or none; None where it does not begin with it."""
    tag, text = _TAG if reasoning else _THOUGHT_TAG, text.strip()
    if opening := tag.match(text):
        text = text[opening.end() :]
    if not text.startswith(reasoning):
        return None
    text = text[len(reasoning) :]
    if closing := tag.match(text):
        text = text[closing.end() :]
    return text.strip()
