"""Messages in the form in which a chat template can write them, and whether it writes all that they say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ctpo_megatron.errors import RenderError
from ctpo_megatron.rollout.template import ChatTemplate, Message

# keys that say which message belongs to which, and nothing that a model could read
LINKS = ("tool_call_id",)
_CALL = {"type": "function", "id": "call00001", "function": {"name": "namesthis", "arguments": "{}"}}
_ARGUMENTS = '{"ofthis": 1}'


class MessageForms:
    """What differs between templates in how a message is handed to them. `tool_role` is the role in which tools speak."""

    def __init__(self, template: ChatTemplate, tool_role: str) -> None:
        self._template = template
        self._tool_role = tool_role
        self._written: set[tuple[tuple[object, ...], ...]] = (
            set()
        )  # forms of conversations of which the template writes all contents

    def fitting(self, messages: Sequence[Message]) -> list[Message]:
        """`messages` without keys that hold null, with tools in a role that the template writes.

        The content of a message that only calls tools is null or empty, as the template wants it. Arguments of calls that are
        JSON text, as OpenAI's interface has them, are given as objects to a template that cannot write the text, or would
        quote it again.
        """
        kept = [{key: value for key, value in message.items() if value is not None or key == "content"} for message in messages]
        for message in kept:
            if message.get("tool_calls") and not message.get("content"):
                message["content"] = self._no_content
            if message.get("tool_calls") and self._wants_objects:
                message["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
        if not any(message["role"] == "tool" for message in kept):
            return kept
        if self._tool_role == "tool" or (any("tool_calls" in message for message in kept) and self._writes(kept)):
            return kept
        return [{**message, "role": "user"} if message["role"] == "tool" else message for message in kept]

    def check_keys(self, messages: Sequence[Message]) -> None:
        """Raise RenderError for a key that makes no difference to what the template writes: content, or any beyond role.

        Whether content is written is looked at once for conversations of the same roles and keys: a template may write a
        system message that comes first, and leave out a later one.
        """
        self._check_content(messages)
        for place, message in enumerate(messages):
            extra = [key for key, value in message.items() if key not in ("role", "content", *LINKS) and value]
            if not extra:
                continue
            upto = [*messages[: place + 1]]
            prompt = message["role"] != "assistant"
            full = self._template.render(upto, prompt=prompt)
            for key in extra:
                without = [*upto[:-1], {name: value for name, value in message.items() if name != key}]
                if self._without(without, prompt) == full:
                    raise RenderError(
                        f"messages[{place}] has the key {key!r}, which {self._template.name} does not write, so a model would "
                        "not see it. Remove the key, move its text into 'content', or give a template that writes it with "
                        "model.chat_template"
                    )

    def _check_content(self, messages: Sequence[Message]) -> None:
        form = tuple((message["role"], bool(message.get("content")), *message) for message in messages)
        if form in self._written:
            return
        prompt = messages[-1]["role"] != "assistant"
        for place, message in enumerate(messages):
            if not message.get("content"):
                continue
            others = [*messages[:place], {**message, "content": "otherwords"}, *messages[place + 1 :]]
            if self._without(others, prompt) == self._template.render(messages, prompt=prompt):
                calls = " beside its calls" if "tool_calls" in message else ""
                raise RenderError(
                    f"messages[{place}]: {self._template.name} does not write the content of a message of the role "
                    f"{message['role']!r}{calls}, so a model would not see it. Move its text into another message, or give a "
                    "template that writes it with model.chat_template"
                )
        self._written.add(form)

    def _without(self, messages: Sequence[Message], prompt: bool) -> str | None:
        try:
            return self._template.render(messages, prompt=prompt)
        except RenderError:
            return None  # the template cannot do without the key

    def _writes(self, messages: Sequence[Message]) -> bool:
        """Whether the template writes these messages, and what the tools in them say."""
        silent = [{**message, "content": "toolsaysthis"} if message["role"] == "tool" else message for message in messages]
        try:
            return self._template.render(silent, prompt=False).count("toolsaysthis") == sum(m["role"] == "tool" for m in silent)
        except RenderError:
            return False

    @cached_property
    def _no_content(self) -> str | None:
        """What the template takes for no content beside calls: empty text, or null where it writes no calls beside text."""
        call = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        try:
            written = self._template.render([{"role": "user", "content": "question"}, call], prompt=False)
        except RenderError:
            return ""
        return "" if "namesthis" in written else None

    @cached_property
    def _wants_objects(self) -> bool:
        """Whether the template cannot write arguments that are JSON text, or would put that text into quotation marks again."""
        call = _CALL | {"function": {"name": "namesthis", "arguments": _ARGUMENTS}}
        message = {"role": "assistant", "content": self._no_content, "tool_calls": [call]}
        try:
            written = self._template.render([{"role": "user", "content": "question"}, message], prompt=False)
        except RenderError:
            return True
        return json.dumps(_ARGUMENTS) in written


def _with_object(call: Any) -> Any:
    """`call` with its arguments as an object, where they are the JSON text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
