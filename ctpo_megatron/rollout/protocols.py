"""What the parts of a rollout ask of one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.types import WHOLE, AttemptId, Generation, Parsed, Prompt, Status, Trajectory, Truncation


class Generator(Protocol):
    """An inference engine."""

    async def generate(
        self,
        input_ids: list[int],
        done: Generation,
        *,
        max_new_tokens: int,
        temperature: float,
        truncation: Truncation,
        stop_token_ids: list[int],
        session: int,
        recorded: int | None,
        deadline: float | None = None,
    ) -> Generation:
        """Continue `input_ids` and what is `done`, which grows part by part and is returned when it is whole.

        `max_new_tokens`: with those in `done`. Requests of one `session` share a prefix and should meet the same server.

        `recorded`: of so many leading tokens the experts are known already. None: neither experts nor top-k tokens nor the
        supports of truncated sampling are wanted. `deadline`, on the clock of the event loop: when it ends with what
        there is, one token at least, for the reason "deadline".
        """
        ...


class TokenText(Protocol):
    """What sampled tokens say, and which of them end a turn."""

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that end an assistant's turn."""
        ...

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`, with or without special tokens. For tools, rewards and people only."""
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


class CallParser(Protocol):
    """Finds the calls of tools in what an assistant wrote."""

    def parse(self, text: str, tools: Sequence[dict[str, Any]]) -> Parsed:
        """Returns a whole turn of the assistant in its parts; only white space between them is dropped.

        `text`: with the names of special tokens (Llama's calls begin with one), without the stop token, and with what the chat
        template wrote before it where that opens a reasoning. `tools` in OpenAI's form: {"type": "function", "function": {"name",
        "description", "parameters"}}. Raises ValueError where those are not such.
        """
        ...


class TalkChat(Protocol):
    """Between the messages of other people's agents and tokens: a prompt as a whole, then what is new after each sampled turn."""

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that end an assistant's turn."""
        ...

    def talk_ids(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] = (), thinking: bool | None = None
    ) -> list[int]:
        """Token ids of a conversation with `tools` to call, generation prompt included. Raises RenderError.

        `thinking`: on or off, where the template knows it; None: as the run has it.
        """
        ...

    def tail_ids(
        self,
        before: Sequence[dict[str, Any]],
        new: Sequence[dict[str, Any]],
        *,
        end: int,
        tools: Sequence[dict[str, Any]] = (),
        thinking: bool | None = None,
    ) -> list[int]:
        """Token ids between a sampled turn of the assistant, whose last token is `end`, and its next turn. Raises RenderError.

        `new` was said between them, `before` up to the sampled turn.
        """
        ...

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`, with or without special tokens."""
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
class PastCall:
    """A program that a tool has run, and what it said."""

    code: str
    output: str


@runtime_checkable
class ToolSessions(Protocol):
    """A tool with a lifetime for each attempt: what an attempt uses is opened with it and closed with it (`tools.opened`)."""

    def session(self, past: Sequence[PastCall]) -> AbstractAsyncContextManager[ToolRunner]:
        """The tool of one attempt, in which `past` has been run before, maybe in another process."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attempt came to, as rewards see it."""

    text: str  # all that the assistant wrote, its turns joined by line ends
    turns: tuple[tuple[str, str], ...] = ()  # "assistant" or "tool", and what it said
    response_tokens: int = 0  # after the prompt, tool output included
    tool_calls: int = 0
    tool_errors: int = 0
    status: Status = Status.FINISHED


@dataclass(frozen=True, slots=True)
class Score:
    """What an answer is worth. `undecided`: it was looked at, nothing could be found out, for the reason `why`; it is worth 0.

    `given`: the answer that was found in the text, None where there is none. `terms`: numbers that are recorded, by their names.
    `accuracy`: what the answer alone is worth, from 0 to 1, where the reward is more than that; None: it is the reward.
    """

    reward: float
    undecided: bool = False
    given: str | None = None
    why: str = ""
    terms: Mapping[str, float] = field(default_factory=dict)
    accuracy: float | None = None


class Reward(Protocol):
    """Judges an answer."""

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        """Returns what an attempt at `prompt` is worth.

        An exception means that nobody looked at the answer: the attempt is tried again, and its group is not trained on if that
        does not help. InputError ends the run.
        """
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one trajectory is sampled."""

    temperature: float
    max_turns: int  # assistant turns
    max_response_tokens: int  # after the prompt, tool output included
    record: bool = False  # for training: with what the run collects besides tokens and log-probs
    truncation: Truncation = WHOLE
    deadline_s: float | None = None  # working time of the whole trajectory; None: no bound


class Grader(Protocol):
    """Compares answers, by the rules that rewards are given by."""

    async def same(self, one: str, other: str) -> bool | None:
        """Returns whether two answers are equal; None where that could not be found out."""
        ...


class Verifier(Reward, Grader, Protocol):
    """A reward that can also tell which answers are the same."""


class Environment(Protocol):
    """Plays attempts from a prompt to their reward."""

    def begin(self, prompt: Prompt, attempt: AttemptId) -> Attempt:
        """Returns an attempt at `prompt` of which nothing is done yet."""
        ...

    async def run(
        self, attempt: Attempt, prompt: Prompt, session: int, sampling: Sampling, note: Callable[[Attempt], None]
    ) -> Trajectory:
        """Returns `attempt`, played from where it is to its end. Its requests belong to `session`, see `Generator.generate`.

        `note` is called where it is worth keeping. When this is cancelled `attempt` holds what was done, so that another call can
        go on.
        """
        ...


@runtime_checkable
class JudgesGroups(Protocol):
    """An environment that judges all attempts at a prompt together, after each of them was judged by itself."""

    async def judge(self, prompt: Prompt, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Returns `trajectories` with their rewards. It may be asked again about the same ones, with the rewards of before."""
        ...


class AttemptStore(Protocol):
    """Keeps what attempts have said over the end of a process."""

    async def find(self, attempt: AttemptId, prompt: Prompt, prompt_ids: list[int]) -> Attempt | Trajectory | None:
        """Returns what is kept of an attempt that may be used again: whole, begun, or nothing.

        Waits until the policy versions that sampled it are published, since only then it shows whether they are the same; but for
        no version that will not be made from the same groups again.
        """
        ...

    def note(self, kept: Attempt | Trajectory) -> None:
        """Keep an attempt as it is now, in place of what was kept of it before. Raises StorageError."""
        ...

    async def sync(self) -> None:
        """Let what was noted outlive the host. Raises StorageError."""
        ...


class Interruptible(Protocol):
    """An inference engine that can be made to give what it has."""

    async def interrupt(self) -> None:
        """Return once all generations in flight hold all that was sampled; nothing is sampled until `go_on`."""
        ...

    def go_on(self) -> None:
        """Sample again."""
        ...
