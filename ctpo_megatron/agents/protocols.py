"""What the parts of the agent endpoint ask of one another.

    HTTP (OpenAI or Anthropic) -> AgentRequest -> Episode.complete -> AgentAnswer -> HTTP

`agents/http/` translates and knows nothing of tokens; `agents/conversation/` knows tokens and nothing of HTTP; `agents/play/`
gives each attempt an `Episode`, starts its agent and ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AgentRequest:
    """One request for an assistant's turn, in words of OpenAI's chat completions whatever its client speaks.

    A message has `role` (system, user, assistant, tool) and `content` (text or None; parts are joined by now); an assistant's may
    have `reasoning_content` and `tool_calls` ({"id", "type": "function", "function": {"name", "arguments": text}}), a tool's has
    `tool_call_id`.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()  # {"type": "function", "function": {"name", "description", "parameters"}}
    max_tokens: int | None = None  # of the answer; None: as many as the attempt has left
    digest: str = ""  # of the body; the same body that is sent again gets the answer that it got
    retries: int = 0  # how often the client says to have sent it before
    stop: tuple[str, ...] = ()  # texts that end the answer; of its tokens, those that make up the first of them are the last
    thinking: bool | None = None  # what the client asks of a template that knows thinking; None: the run's own


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wrote and that can be used."""

    id: str
    name: str
    arguments: str  # JSON, as the model wrote it


@dataclass(frozen=True, slots=True)
class AgentAnswer:
    """One sampled turn, as clients see it; the streams are of equal length and hold all that was sampled, its end included."""

    id: str
    content: str | None
    reasoning: str | None
    calls: tuple[ToolCall, ...]
    finish: Literal["stop", "length", "tool_calls"]
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    logp: Sequence[float]
    versions: Sequence[int]
    texts: Sequence[str]  # each token by itself, for clients that ask for log-probs


class EpisodeOver(Exception):
    """The attempt takes no more requests: its budget or time is used up, or it has ended. No repeat heals that."""


class RequestUnusable(Exception):
    """A request that no repeat makes right; the message says what is wrong and what is allowed."""


class Episode(Protocol):
    """One attempt, as its agent's requests make it."""

    async def complete(self, request: AgentRequest) -> AgentAnswer:
        """Returns the assistant's next turn, or the one that the same request got before. Raises EpisodeOver, RequestUnusable.

        When it is cancelled (the client is gone) what was sampled is kept, and the same request goes on from there.
        """
        ...


class Episodes(Protocol):
    """The attempts that run now, by the keys of their agents."""

    def find(self, key: str) -> Episode | None:
        """Returns the episode whose agent was given `key`; None: there is none."""
        ...
