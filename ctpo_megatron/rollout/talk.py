"""Conversations of other people's agents as tokens: a prompt as a whole, then only what is new after each sampled turn.

All that these messages hold is somebody else's: names of special tokens in them stay plain text.

What a template cannot write as it was sent is written in the first of these ways in which it can: calls whose arguments are no
JSON object as text of the turn, then all calls; the system's words in the user's role. Tools speak in their own role, after a
turn without or with calls, or in the user's; words of the user that follow each other may have to be one message.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ctpo_megatron.errors import RenderError
from ctpo_megatron.rollout.messages import MessageForms
from ctpo_megatron.rollout.template import ChatTemplate, Message
from ctpo_megatron.rollout.tokens import MARK, Tokens

log = logging.getLogger(__name__)

_WORDS, _PROBE = "assistantsaysthis", "somebodysaysthis"
_REMEMBERED = 4096  # forms of conversations
_FORMS = ("plain", "calls", "user")  # how tools speak


class Talk:
    """Writes what agents send by a model's own template."""

    def __init__(self, template: ChatTemplate, tokens: Tokens, forms: MessageForms) -> None:
        self._template, self._tokens, self._forms = template, tokens, forms
        self._chosen: dict[tuple[object, ...], int] = {}  # the first way that can be written, by the form of a conversation
        self._warned = False

    def whole(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], thinking: bool | None) -> list[int]:
        """Token ids of a conversation (`rollout.protocols.TalkChat.talk_ids`)."""
        more = self._more(tools, thinking)
        text = self._first(self._marked(messages), more, 0, self._render)
        for tool in tools:
            if not self._warned and str(tool["function"]["name"]) not in text:
                self._warned = True
                log.warning(
                    "%s does not write tools into the prompt: a model learns of them from messages only.", self._template.name
                )
        return self._tokens.ids(text)

    def tail(
        self,
        before: Sequence[Message],
        new: Sequence[Message],
        end: int,
        tools: Sequence[dict[str, Any]],
        thinking: bool | None,
    ) -> list[int]:
        """Token ids of what is new (`rollout.protocols.TalkChat.tail_ids`).

        Of what was said before only the roles are rendered: they decide how a template goes on, and what is in them may be what
        it cannot write.
        """
        words = _WORDS
        while any(words in str(message) for message in new):
            words += "s"
        messages = [*_skeleton(before), {"role": "assistant", "content": words}, *self._marked(new)]
        more = self._more(tools, thinking)
        text = self._first(messages, more, len(before) + 1, lambda each, more: self._after(each, words, more))
        name = next((name for name, id_ in self._tokens.ends.items() if id_ == end), None)
        own = self._tokens.find_end(text)
        if name is None:  # the turn was cut short: the template ends it
            return self._tokens.ids(text)
        if own is not None and own[0] == name:
            text = text[own.end() :]
        return self._tokens.ids_after(name, text)

    def _first(
        self,
        messages: list[Message],
        more: dict[str, Any],
        start: int,
        write: Callable[[list[Message], dict[str, Any]], str],
    ) -> str:
        """What `write` makes of the first way to send `messages` in which all that is said from `start` on is written."""
        shape = (start, *sorted(more), *map(_shape, messages))
        if len(self._chosen) > _REMEMBERED:
            self._chosen.clear()
        if shape not in self._chosen:
            probes = [m if place < start else _probe(m, place) for place, m in enumerate(messages)]
            self._chosen[shape] = self._choose(probes, more, write)
        for number, way in enumerate(_ways(messages)):
            if number == self._chosen[shape]:
                return write(way, more)
        raise AssertionError("the same ways were counted before")

    def _choose(self, probes: list[Message], more: dict[str, Any], write: Callable[[list[Message], dict[str, Any]], str]) -> int:
        wanted = [word for message in probes for word in _probes_in(message)]
        first, lost = None, False
        for number, way in enumerate(_ways(probes)):
            try:
                text = write(way, more)
            except RenderError as error:
                first = first or error
                continue
            if all(text.count(word) == 1 for word in wanted):
                return number
            lost = True
        if first is not None and not lost:
            raise first
        raise RenderError(f"{self._template.name} does not write all of a conversation of {_roles(probes)}")

    def _render(self, messages: list[Message], more: dict[str, Any]) -> str:
        return self._template.render(self._forms.fitting(messages), prompt=True, more=more)

    def _after(self, messages: list[Message], words: str, more: dict[str, Any]) -> str:
        """What is written behind the assistant's `words`, from the end of its turn on."""
        written = self._render(messages, more)
        _, found, after = written.rpartition(words)
        if not found:
            raise RenderError(f"{self._template.name} does not write an assistant's words as they are; it writes {written!r}")
        if not any(message["content"] == words for message in messages):  # the rest of the call is the assistant's
            end = self._tokens.find_end(after)
            if end is None:
                raise RenderError(f"{self._template.name} writes no stop token after a call; it writes {after!r}")
            after = after[end.start() :]
        return after

    def _marked(self, messages: Sequence[Message]) -> list[Message]:
        marked: list[Message] = self._tokens.mark(_readable(list(messages)))
        for message, given in zip(marked, messages, strict=True):
            message["role"] = given["role"]
        return marked

    def _more(self, tools: Sequence[dict[str, Any]], thinking: bool | None) -> dict[str, Any]:
        given = {"tools": self._tokens.mark(_readable(list(tools)))} if tools else {}
        return given | self._template.thinking(thinking)


def _shape(message: Message) -> tuple[object, ...]:
    calls = tuple(_is_object(call["function"]["arguments"]) for call in message.get("tool_calls", ()))
    return message["role"], bool(message.get("content")), calls


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message["role"] for message in messages)


def _probe(message: Message, place: int) -> Message:
    """`message` with words that tell whether they are written, in the place of its content and of the names of its calls."""
    made = message | ({"content": f"{_PROBE}{place}."} if message.get("content") else {})
    if calls := message.get("tool_calls"):
        made["tool_calls"] = [
            call | {"function": call["function"] | {"name": f"{_PROBE}{place}_{number}."}} for number, call in enumerate(calls)
        ]
    return made


def _probes_in(message: Message) -> list[str]:
    words = [message.get("content") or "", *(call["function"]["name"] for call in message.get("tool_calls", ()))]
    return [word for word in words if word.startswith(_PROBE)]


def _readable(value: Any) -> Any:
    """`value` with the mark's own character, if somebody wrote it, as one that cannot be read."""
    if isinstance(value, str):
        return value.replace(MARK, "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, dict):
        return {_readable(key): _readable(each) for key, each in value.items()}
    return [_readable(each) for each in value] if isinstance(value, list | tuple) else value


def _skeleton(messages: Sequence[Message]) -> list[Message]:
    """The same roles with other words."""
    words = {"system": "system", "user": "question", "assistant": "answer", "tool": "output"}
    return [{"role": message["role"], "content": words.get(message["role"], "words")} for message in messages]


def _in_form(form: str, messages: list[Message]) -> list[Message]:
    """`messages` with tools that speak as `form` says: as they are, after calls that they answer, or as the user."""
    if form == "user":
        return [{**message, "role": "user"} if message["role"] == "tool" else message for message in messages]
    if form == "plain":
        return messages
    made: list[Message] = []
    for place, message in enumerate(messages):
        answers = 0
        for follower in messages[place + 1 :]:
            if follower["role"] != "tool":
                break
            answers += 1
        if message["role"] == "assistant" and answers and not message.get("tool_calls"):
            name = message["content"] if message["content"].startswith(_WORDS) else "call"
            ids = [f"call{len(made):04d}{number % 10}" for number in range(answers)]
            calls = [{"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}} for id_ in ids]
            made.append({"role": "assistant", "content": "", "tool_calls": calls})
            made += [{**each, "tool_call_id": id_} for each, id_ in zip(messages[place + 1 :], ids, strict=False)]
        elif len(made) <= place:
            made.append(message)
    return made


def _ways(messages: list[Message]) -> Iterator[list[Message]]:
    """Ways to send the same messages, the truest first."""
    way: list[Message] | None = None
    for change in (list, _broken_calls_as_text, _calls_as_text, _systems_as_user):
        changed = change(messages if way is None else way)
        if changed == way:
            continue
        way = changed
        for form in _FORMS:
            formed = _in_form(form, way)
            if form != "plain" and formed == way:
                continue
            yield formed
            if (merged := _users_as_one(formed)) != formed:
                yield merged


def _broken_calls_as_text(messages: list[Message]) -> list[Message]:
    return _as_text(messages, lambda call: not _is_object(call["function"]["arguments"]))


def _calls_as_text(messages: list[Message]) -> list[Message]:
    return _as_text(messages, lambda call: True)


def _as_text(messages: list[Message], chosen: Callable[[dict[str, Any]], bool]) -> list[Message]:
    """`messages` with the chosen calls as JSON in the content."""
    made = []
    for message in messages:
        calls = message.get("tool_calls", [])
        said = [_call_text(call["function"]) for call in calls if chosen(call)]
        if said:
            others = [call for call in calls if not chosen(call)]
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message["content"] = "\n".join(filter(None, [message.get("content"), *said]))
            message |= {"tool_calls": others} if others else {}
        made.append(message)
    return made


def _call_text(function: dict[str, Any]) -> str:
    arguments = function["arguments"]
    said = {"name": function["name"], "arguments": json.loads(arguments) if _is_object(arguments) else arguments}
    return json.dumps(said, ensure_ascii=False)


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _systems_as_user(messages: list[Message]) -> list[Message]:
    return [{**message, "role": "user"} if message["role"] == "system" else message for message in messages]


def _users_as_one(messages: list[Message]) -> list[Message]:
    made: list[Message] = []
    for message in messages:
        if made and message["role"] == made[-1]["role"] == "user":
            made[-1] = {**made[-1], "content": f"{made[-1]['content']}\n\n{message['content']}"}
        else:
            made.append(message)
    return made
