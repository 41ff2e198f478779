"""What the two languages of the endpoint have in common: a request that was understood, and what writes its answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ctpo_megatron.agents.http.bodies import Body
from ctpo_megatron.agents.http.refusals import Refusal, shown
from ctpo_megatron.agents.protocols import AgentAnswer, AgentRequest

PIECE_CHARACTERS = 8192  # of text in one event: some clients bound the length of a line
MOST_STOPS = 16  # texts that end an answer
PIECE_TOKENS = 256  # in one event, for clients that ask for lists


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was understood. `model`: what the client called it. `not_applied`: parameters that the run sets itself."""

    request: AgentRequest
    model: str
    stream: bool
    not_applied: tuple[str, ...] = ()
    usage: bool = False  # at the end of a stream
    logprobs: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False


class Dialect(Protocol):
    """One language: how a request is read and how an answer, or a refusal, is written."""

    sign_of_life: bytes  # in a stream; nothing to its client

    def read(self, body: Body, *, retries: int, overlooked: Collection[str]) -> Asked:
        """Returns what `body` asks for. Raises Refusal."""
        ...

    def answer(self, asked: Asked, answer: AgentAnswer) -> bytes:
        """Returns the JSON of a whole answer."""
        ...

    def stream(self, asked: Asked, answer: AgentAnswer) -> bytes:
        """Returns all events of an answer, one after the other."""
        ...

    def error(self, refusal: Refusal) -> bytes:
        """Returns the JSON of an error."""
        ...

    def stream_error(self, refusal: Refusal) -> bytes:
        """Returns the event of an error within a stream."""
        ...


def pieces(text: str) -> list[str]:
    """Returns `text` in parts of at most PIECE_CHARACTERS; none where it is empty."""
    return [text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS)]


def model_name(body: Mapping[str, Any]) -> str:
    """Returns what the client calls the model. Raises Refusal."""
    name = body.get("model")
    if name is not None and not isinstance(name, str):
        raise Refusal(f"model is text, not {shown(name)}")
    return name or "policy"


def flag(body: Mapping[str, Any], name: str) -> bool:
    """Returns the parameter `name`, true or false; false where it is missing. Raises Refusal."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refusal(f"{name} is true or false, not {shown(value)}")
    return bool(value)


def positive(body: Mapping[str, Any], name: str) -> int | None:
    """Returns the parameter `name`, an integer from 1 on. Raises Refusal."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Refusal(f"{name} is an integer from 1 on, not {shown(value)}")
    return value


def texts(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Returns the parameter `name`, a text or a list of texts. Raises Refusal."""
    value = body.get(name)
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list) or len(found) > MOST_STOPS or not all(isinstance(each, str) and each for each in found):
        raise Refusal(f"{name} is a text or a list of at most {MOST_STOPS} texts, none of them empty, not {shown(value)}")
    return tuple(found)


def message_list(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the history, a list of objects. Raises Refusal when it is none or empty."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages is a list with at least one message")
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise Refusal(f"messages[{place}] is an object with role and content, not {shown(message)}")
    return messages
