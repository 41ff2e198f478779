"""What the parts of a rollout ask of one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ctpo_megatron.types import AttemptId, Generation, Prompt, Trajectory


class Generator(Protocol):
    """An inference engine."""

    async def generate(
        self,
        input_ids: list[int],
        *,
        max_new_tokens: int,
        temperature: float,
        stop_token_ids: list[int],
        session: int,
        recorded: int | None,
    ) -> Generation:
        """Continue `input_ids`. Requests of one `session` share a prefix and should meet the same server.

        `recorded`: of so many leading tokens the experts are known already. None: neither experts nor top-k tokens are
        wanted.
        """
        ...


class Chat(Protocol):
    """Between text and tokens."""

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that end an assistant's turn."""
        ...

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, generation prompt included."""
        ...

    def tool_ids(self, text: str, *, earlier: Sequence[str] = (), end: int | None = None) -> list[int]:
        """Token ids between an assistant's turn, which ended with the token `end`, and its next, for a tool that said `text`.

        `earlier` are the outputs after turns before this one. `end` None: the usual end of a turn.
        """
        ...

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`, with or without special tokens. For tools, rewards and people only."""
        ...


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool said."""

    output: str
    ok: bool  # False where the model's code failed
    seconds: float


class ToolRunner(Protocol):
    """Executes code that a model wrote."""

    async def run(self, code: str) -> ToolResult:
        """Errors of the code are results; an exception means that the tool itself is broken."""
        ...


@dataclass(frozen=True, slots=True)
class Score:
    """What an answer is worth. `undecided`: nothing could be found out about it, and it is worth 0."""

    reward: float
    undecided: bool = False


class Reward(Protocol):
    """Judges an answer."""

    async def score(self, prompt: Prompt, text: str) -> Score:
        """Returns what the assistant's `text` is worth as an answer to `prompt`."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one trajectory is sampled."""

    temperature: float
    max_turns: int  # assistant turns
    max_response_tokens: int  # after the prompt, tool output included
    record: bool = False  # for training: with what the run collects besides tokens and log-probs


class Environment(Protocol):
    """Plays one trajectory from a prompt to its reward."""

    async def run(self, prompt: Prompt, attempt: AttemptId, session: int, sampling: Sampling) -> Trajectory:
        """Returns the `attempt` at `prompt`. All its requests belong to `session`, see `Generator.generate`."""
        ...
