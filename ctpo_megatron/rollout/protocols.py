"""What the parts of a rollout ask of one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.types import Prompt, TopK, Trajectory


class Generation(Protocol):
    """One answer of an inference engine. The streams have equal lengths; a stop token that ended it is the last entry."""

    @property
    def token_ids(self) -> list[int]:
        """Sampled token ids."""
        ...

    @property
    def rollout_logp(self) -> list[float]:
        """The engine's log-prob of each, at the sampling temperature."""
        ...

    @property
    def versions(self) -> list[int]:
        """The policy version that sampled each."""
        ...

    @property
    def finish(self) -> str:
        """`stop` where the last token is a stop token, `length` where max_new_tokens was reached."""
        ...

    @property
    def top_k(self) -> TopK | None:
        """The top-k tokens at the place of each, where the engine was asked for them."""
        ...

    @property
    def routed_experts(self) -> NDArray[np.signedinteger] | None:
        """Experts of the tokens from `recorded` to the one before the last, where the engine was asked for them."""
        ...


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

        `recorded`: of so many leading tokens the experts are known already. None: neither experts nor likeliest tokens are
        wanted.
        """
        ...


class Chat(Protocol):
    """Between text and tokens."""

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that end an assistant's turn."""
        ...

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, generation prompt included."""
        ...

    def tool_ids(self, text: str) -> list[int]:
        """Token ids between the end token of an assistant's turn and the start of the next, for a tool that said `text`."""
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


class Reward(Protocol):
    """Judges an answer."""

    async def score(self, prompt: Prompt, text: str) -> float:
        """Reward of the assistant's `text`."""
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

    async def run(self, prompt: Prompt, session: int, sampling: Sampling) -> Trajectory:
        """One attempt at `prompt`."""
        ...
