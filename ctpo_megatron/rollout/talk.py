"""Conversations of other people's agents as tokens: a prompt as a whole, then only what is new after each sampled turn.

All that these messages hold is somebody else's: names of special tokens in them stay plain text.

What a template cannot write as it was sent is written in the first of these ways in which it can: calls whose arguments are no
JSON object as text of the turn, then all calls; the system's words in the user's role; words of the user that follow each other
as one message. Tools speak in their own role, after a turn without or with calls, or in the user's: as the template writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ctpo_megatron.errors import RenderError
from ctpo_megatron.rollout.messages import MessageForms
from ctpo_megatron.rollout.template import ChatTemplate, Message
from ctpo_megatron.rollout.tokens import MARK, Tokens

_WORDS, _PROBE = "assistantsaysthis", "somebodysaysthis"
_TOOL_FORMS = ("plain", "calls", "user")


class Talk:
    """Writes what agents send by a model's own template."""

    def __init__(self, template: ChatTemplate, tokens: Tokens, forms: MessageForms) -> None:
        self._template, self._tokens, self._forms = template, tokens, forms
        self._known: dict[tuple[object, ...], str] = {}  # how tools speak, by the roles and turns around them

    def whole(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], thinking: bool | None) -> list[int]:
        """Token ids of a conversation (`rollout.protocols.TalkChat.talk_ids`)."""
        marked, more = self._marked(messages), self._more(tools, thinking)
        return self._tokens.ids(_first(lambda each: self._render(each, more), _ways(marked)))

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
        marked, more = self._marked(new), self._more(tools, thinking)
        text = _first(lambda each: self._after(_skeleton(before), each, more), _ways(marked))
        name = next((name for name, id_ in self._tokens.ends.items() if id_ == end), None)
        own = self._tokens.find_end(text)
        if name is None:  # the turn was cut short: the template ends it
            return self._tokens.ids(text)
        if own is not None and own[0] == name:
            text = text[own.end() :]
        return self._tokens.ids_after(name, text)

    def _after(self, before: list[Message], new: list[Message], more: dict[str, Any]) -> str:
        """Text behind the words of an assistant's turn that `new` follows, in the first form that writes all of it."""
        shape = (*((m["role"], len(m.get("tool_calls", ()))) for m in [*before, {"role": "/"}, *new]), *sorted(more))
        if shape not in self._known:
            self._known[shape] = self._find_form(before, new, more)
        return self._written(self._known[shape], before, new, more)

    def _find_form(self, before: list[Message], new: list[Message], more: dict[str, Any]) -> str:
        probes = [{**message, "content": f"{_PROBE}{place}."} for place, message in enumerate(new)]
        error = RenderError(f"{self._template.name} does not write these messages after an assistant's turn")
        for form in _TOOL_FORMS:
            try:
                text = self._written(form, before, probes, more)
            except RenderError as failed:
                error = failed
                continue
            if all(probe["content"] in text or probe.get("tool_calls") for probe in probes):
                return form
        raise error

    def _written(self, form: str, before: list[Message], new: list[Message], more: dict[str, Any]) -> str:
        words = _WORDS
        while any(words in str(message) for message in new):
            words += "s"
        turn: Message = {"role": "assistant", "content": words}
        messages = _in_form(form, [*before, turn, *new], words)
        written = self._render(messages, more)
        _, found, after = written.rpartition(words)
        if not found:
            raise RenderError(f"{self._template.name} does not write an assistant's words as they are; it writes {written!r}")
        if messages[len(before)].get("tool_calls"):  # the rest of the call is the assistant's
            end = self._tokens.find_end(after)
            if end is None:
                raise RenderError(f"{self._template.name} writes no stop token after a call; it writes {after!r}")
            after = after[end.start() :]
        return after

    def _render(self, messages: list[Message], more: dict[str, Any]) -> str:
        written = self._template.render(self._forms.fitting(messages), prompt=True, more=more)
        for message in messages:
            if message.get("tool_calls") and (message.get("content") or "").strip() not in written:
                raise RenderError(f"{self._template.name} does not write the content of a message beside its calls")
        return written

    def _marked(self, messages: Sequence[Message]) -> list[Message]:
        marked: list[Message] = self._tokens.mark(_readable(list(messages)))
        for message, given in zip(marked, messages, strict=True):
            message["role"] = given["role"]
        return marked

    def _more(self, tools: Sequence[dict[str, Any]], thinking: bool | None) -> dict[str, Any]:
        given = {"tools": self._tokens.mark(_readable(list(tools)))} if tools else {}
        return given | self._template.thinking(thinking)


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


def _in_form(form: str, messages: list[Message], words: str) -> list[Message]:
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
            name = words if message["content"] == words else "call"
            ids = [f"call{len(made):04d}{number % 10}" for number in range(answers)]
            calls = [{"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}} for id_ in ids]
            made.append({"role": "assistant", "content": "", "tool_calls": calls})
            made += [{**each, "tool_call_id": id_} for each, id_ in zip(messages[place + 1 :], ids, strict=False)]
        elif len(made) <= place:
            made.append(message)
    return made


def _ways(messages: list[Message]) -> Iterator[list[Message]]:
    """Ways to send the same messages, the truest first."""
    way = messages
    yield way
    for change in (_broken_calls_as_text, _calls_as_text, _systems_as_user, _one_message_a_role):
        changed = change(way)
        if changed != way:
            yield changed
        way = changed


def _broken_calls_as_text(messages: list[Message]) -> list[Message]:
    return _as_text(messages, lambda call: not _is_object(call["function"]["arguments"]))


def _calls_as_text(messages: list[Message]) -> list[Message]:
    return _as_text(messages, lambda call: True)


def _as_text(messages: list[Message], chosen: Callable[[dict[str, Any]], bool]) -> list[Message]:
    """`messages` with the chosen calls as JSON in the content."""
    made = []
    for message in messages:
        calls = message.get("tool_calls", [])
        said = [json.dumps({k: c["function"][k] for k in ("name", "arguments")}, ensure_ascii=False) for c in calls if chosen(c)]
        if said:
            others = [call for call in calls if not chosen(call)]
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message["content"] = "\n".join(filter(None, [message.get("content"), *said]))
            message |= {"tool_calls": others} if others else {}
        made.append(message)
    return made


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _systems_as_user(messages: list[Message]) -> list[Message]:
    return [{**message, "role": "user"} if message["role"] == "system" else message for message in messages]


def _one_message_a_role(messages: list[Message]) -> list[Message]:
    made: list[Message] = []
    for message in messages:
        if made and message["role"] == made[-1]["role"] == "user":
            made[-1] = {**made[-1], "content": f"{made[-1]['content']}\n\n{message['content']}"}
        else:
            made.append(message)
    return made


def _first(write: Callable[[list[Message]], str], ways: Iterator[list[Message]]) -> str:
    """The text of the first way that can be written. Raises the first one's RenderError where none can."""
    first: RenderError | None = None
    for way in ways:
        try:
            return write(way)
        except RenderError as error:
            first = first or error
    assert first is not None, "there is at least one way"
    raise first
