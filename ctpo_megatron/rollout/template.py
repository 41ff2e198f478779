"""A model's chat template: from a conversation to text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, time
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ctpo_megatron.config.model import ChatConfig
from ctpo_megatron.errors import ConfigError, ModelError, RenderError, near_miss

Message = dict[str, Any]
NOTHING: Mapping[str, Any] = MappingProxyType({})
THINKING = ("enable_thinking", "thinking")  # what templates call the variable: Qwen3 and GLM-4.5, DeepSeek-V3.1 and Granite

# what code in a template can raise, besides jinja2.TemplateError
_CODE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """The chat template that `tokenizer` holds, with the variables that the configuration gives it.

    `owner` names the model in messages. Raises ConfigError for an option that the template does not mention, and ModelError
    where it is no Jinja.
    """

    def __init__(self, tokenizer: Any, owner: str, chat: ChatConfig) -> None:
        self._tokenizer = tokenizer
        self.name = "the template of model.chat_template" if chat.chat_template else f"the chat template of {owner}"
        self._date = chat.chat_date
        self._variables: dict[str, Any] = {"strftime_now": self._now, **chat.chat_options}
        if self._date is not None:
            self._variables.setdefault("date_string", self._now("%d %b %Y"))
        self._check_syntax()
        self._check_options(chat)

    @property
    def source(self) -> str:
        """The template itself."""
        return str(self._tokenizer.get_chat_template())

    def render(self, messages: Sequence[Message], *, prompt: bool, more: Mapping[str, Any] = NOTHING) -> str:
        """Text of `messages`; with `prompt` up to where the assistant begins its next turn. Raises RenderError.

        `more`: what this conversation gives the template besides its messages, such as its tools; before what is configured.
        """
        try:
            return self._apply(list(messages), prompt, more)
        except RenderError as error:
            raise RenderError(f"{error}{self._blame_system(messages, prompt)}") from error.__cause__

    def token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a prompt as transformers itself makes them of the template."""
        return self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False, **self._variables
        )

    def thinking(self, on: bool | None) -> dict[str, bool]:
        """Returns the variables that turn thinking on or off in a template that mentions one; none of them for None."""
        return {} if on is None else {name: on for name in THINKING if re.search(rf"\b{name}\b", self.source)}

    def _apply(self, messages: list[Message], prompt: bool, more: Mapping[str, Any] = NOTHING) -> str:
        from jinja2 import TemplateError

        variables = {**self._variables, **more}
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **variables)
        except (TemplateError, *_CODE_ERRORS) as error:
            if isinstance(error, RenderError):  # of `_now`: a ValueError too
                raise
            words = str(error) if type(error) is TemplateError else f"{type(error).__name__}: {error}"
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise RenderError(f"{self.name} cannot write a conversation of {roles}. It says: {words}") from error

    def _blame_system(self, messages: Sequence[Message], prompt: bool) -> str:
        """A sentence about the setting to change where the conversation could be written without its system message."""
        others = [message for message in messages if message.get("role") != "system"]
        if not others or len(others) == len(messages):
            return ""
        try:
            self._apply(others, prompt)
        except RenderError:
            return ""
        return (
            ". It can write it without the system message: set data.system_prompt to null where the message is from there, move "
            "its text into the user's message, or give another template with model.chat_template."
        )

    def _now(self, form: str) -> str:
        if self._date is None:
            raise RenderError(
                f"{self.name} writes today's date into the prompt, which would be another prompt tomorrow: set model.chat_date, "
                "such as model.chat_date=2026-01-31"
            )
        return datetime.combine(self._date, time()).strftime(form)

    def _check_syntax(self) -> None:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            self._apply([{"role": "user", "content": "question"}], True)
        except RenderError as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                cause = error.__cause__
                raise ModelError(f"{self.name} is not Jinja: line {cause.lineno}: {cause.message}") from error
            if error.__cause__ is None:  # it asks for a date that nobody gave
                raise ConfigError(str(error)) from error
            if not isinstance(error.__cause__, TemplateError):
                raise ModelError(str(error)) from error

    def _check_options(self, chat: ChatConfig) -> None:
        words = set(re.findall(r"\w+", self.source))
        for option in chat.chat_options:
            if option not in words:
                raise ConfigError(f"model.chat_options.{option}: {self.name} does not mention it.{near_miss(option, words)}")


def given_template(text: str) -> str:
    """The template that `model.chat_template` means: `text` itself where it is Jinja, otherwise the file of that name."""
    if "{{" in text or "{%" in text:
        return text
    path = Path(text).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"model.chat_template: {path} is not a readable file ({error}); give a file, or the template itself"
        ) from error
