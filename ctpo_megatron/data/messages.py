"""Messages of a conversation, as files hold them: which keys and contents are passed on to the chat template, which are refused.

Nothing is left out in silence. Keys that chat templates read are passed on as they are, for the renderer to see that the model's
own template writes them; other keys are refused. So are parts of a content that are not text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from ctpo_megatron.data.tables import check_keys, quote
from ctpo_megatron.errors import CtpoError, DataError, RenderError, near_miss

Message = dict[str, Any]

# What the chat templates of Qwen, Llama, DeepSeek, GLM, Kimi, Mistral and gpt-oss read of a message.
CARRIERS = ("tool_calls", "reasoning_content", "thinking")  # what an author wrote, besides its content
LINKS = ("name", "tool_call_id", "prefix")  # who is meant; templates may do without
KEYS = ("role", "content", *CARRIERS, *LINKS)
_TEXT_PARTS = ("text", "input_text", "output_text")


class PromptTokenizer(Protocol):
    """Turns a conversation into the tokens that generation starts from."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of `messages`, generation prompt included."""
        ...


def check_messages(place: str, column: str, messages: Any, roles: Sequence[str]) -> tuple[Message, ...]:
    """Returns `messages` as a tuple of dicts with `role`, `content` (text) and what else the chat template may read.

    Keys whose value is null or an empty list count as absent. Text parts are joined. Raises DataError, naming the message and
    the key, for anything but a list of those in these `roles`.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: {column!r} is {quote(messages)}; needed: a list of {{role, content}} with at least one entry")
    return tuple(_message(f"{place}: {column}[{number}]", message, roles) for number, message in enumerate(messages))


def _message(where: str, message: Any, roles: Sequence[str]) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {quote(message)}; needed: {{role, content}}")
    calls = message.get("tool_calls")
    check_keys(where, message, ("role",) if calls else ("role", "content"))
    role, content = message["role"], message.get("content")
    if role not in roles:
        raise DataError(f"{where} has role {quote(role)}; allowed: {', '.join(roles)}")
    if not isinstance(content, str):
        content = _joined(where, content) if isinstance(content, list) else "" if calls and content is None else content
    if not isinstance(content, str) or not (content.strip() or calls or role == "tool"):
        raise DataError(f"{where} has content {quote(content)}; needed: text that is not blank")
    if len(message) == 2:
        return {"role": role, "content": content}
    return {"role": role, "content": content, **_others(where, message)}


def _others(where: str, message: Message) -> Message:
    """Returns the keys besides role and content. Raises DataError for those that no chat template reads."""
    found = {key: value for key, value in message.items() if key not in ("role", "content") and value not in (None, [], "")}
    for key, value in found.items():
        if key not in KEYS:
            raise DataError(
                f"{where} has the key {key!r} ({quote(value)}), which would not reach the model. Remove it, or write it into the "
                f"content; allowed: {', '.join(KEYS)}.{near_miss(key, KEYS)}"
            )
        if key in CARRIERS and message["role"] != "assistant":
            raise DataError(f"{where} has {key!r}, but its role is {message['role']!r}; only an assistant's message has that")
    return found


def _joined(where: str, parts: list[Any]) -> str:
    """Returns the text of a content that is given in parts."""
    texts = []
    for number, part in enumerate(parts):
        held = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        kind = held.get("type", "text" if "text" in held else None)
        if kind not in _TEXT_PARTS or not isinstance(held.get("text"), str) or held.keys() - {"type", "text"}:
            raise DataError(
                f"{where}: content[{number}] is {quote(part)}; the model reads text alone, so every part has to be "
                "{type: text, text: ...}. Remove the rows that need something else"
            )
        texts.append(held["text"])
    return "".join(texts)


@contextmanager
def rendering(place: str) -> Iterator[None]:
    """Inside it, what a chat template or tokenizer raises about a conversation becomes a DataError that begins with `place`.

    Templates are programs: besides jinja's errors, those of Python's own operators come out of them.
    """
    from jinja2 import TemplateError

    try:
        yield
    except RenderError as error:
        raise DataError(f"{place}: {error}") from error
    except CtpoError:
        raise
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(
            f"{place}: the model's chat template cannot write this conversation: {str(error) or type(error).__name__}. Change "
            "the row (or data.system_prompt, where that is set), or the template."
        ) from error
