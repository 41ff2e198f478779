"""One attempt at a prompt, from admission to its end: what it has said so far, so that it can go on anywhere, at any moment.

    prompt -> [assistant's turn, tool's turn] ... -> status, reward -> `types.Trajectory`

The turn that the assistant is in is `open`: it grows part by part, each token with the version that sampled it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.types import AttemptId, Generation, Status, Turn


@dataclass(slots=True)
class Attempt:
    """A trajectory in the making. All of it is plain data: a program that a tool ran is known by its turn and its output."""

    id: AttemptId
    prompt_index: int
    prompt_ids: list[int]
    turns: list[Turn] = field(default_factory=list)  # those that are complete
    open: Generation | None = None  # the assistant's turn that is being sampled; None between turns
    finish: Literal["stop", "length", "deadline"] | None = None  # why the assistant's last complete turn ended
    outputs: list[str] = field(default_factory=list)  # what tools said
    routed_experts: list[NDArray[np.signedinteger]] = field(default_factory=list)  # of all tokens but the last, turn by turn
    status: Status | None = None  # how it ended; its reward may still be open
    tool_calls: int = 0
    tool_errors: int = 0
    seconds: float = 0.0  # that it took, over all processes that worked on it, without those since `working_since`
    working_since: float | None = None  # on the clock of the event loop; None: nobody works on it
    task_ids: list[int] | None = None  # of the prompt as the run has it, where a world said more before the first turn

    @property
    def tokens(self) -> list[int]:
        """Returns the prompt and all complete turns."""
        return [*self.prompt_ids, *(token for turn in self.turns for token in turn.token_ids)]

    @property
    def response_length(self) -> int:
        """Returns how many tokens follow the prompt in complete turns, the tool's included."""
        return sum(len(turn.token_ids) for turn in self.turns)

    @property
    def assistant_turns(self) -> list[Turn]:
        """Returns the assistant's complete turns."""
        return [turn for turn in self.turns if turn.role == "assistant"]

    @property
    def awaits_tool(self) -> bool:
        """Returns whether the last thing that happened is a complete turn of the assistant, to which nothing has answered yet."""
        return self.open is None and bool(self.turns) and self.turns[-1].role == "assistant"

    @property
    def recorded(self) -> int:
        """Returns of how many leading tokens it is known which experts they went to."""
        return sum(map(len, self.routed_experts))

    @property
    def versions(self) -> set[int]:
        """Returns the policy versions that sampled its tokens, those of the open turn included."""
        found = {version for turn in self.assistant_turns for version in turn.versions}
        return found | set(self.open.versions if self.open else [])

    @property
    def worked_s(self) -> float:
        """Returns the seconds that it took by now."""
        since = self.working_since
        return self.seconds if since is None else self.seconds + asyncio.get_running_loop().time() - since

    def begin_anew(self) -> None:
        """Forget all that was done; the time that it took stays. Note it at once where it is kept (`AttemptStore.note`)."""
        self.turns, self.outputs, self.routed_experts = [], [], []
        self.open = self.finish = self.status = None
        self.tool_calls = self.tool_errors = 0

    def open_with(self, prompt_ids: list[int]) -> None:
        """Let it begin with these, which a world made of its prompt. It is found again by the prompt as the run has it."""
        if self.task_ids is None and prompt_ids != self.prompt_ids:
            self.task_ids = self.prompt_ids
        self.prompt_ids = prompt_ids

    def begin_work(self) -> None:
        """Let its time run."""
        self.working_since = asyncio.get_running_loop().time()

    def end_work(self) -> None:
        """Let its time stand still."""
        self.seconds, self.working_since = self.worked_s, None

    def copy(self) -> Attempt:
        """Returns it as it is now, its time standing still: what is added to this one later does not show there."""
        return Attempt(
            self.id,
            self.prompt_index,
            self.prompt_ids,
            self.turns.copy(),
            None if self.open is None else self.open.copy(),
            self.finish,
            self.outputs.copy(),
            self.routed_experts.copy(),
            self.status,
            self.tool_calls,
            self.tool_errors,
            self.worked_s,
            task_ids=self.task_ids,
        )

    def close_turn(self, generation: Generation) -> None:
        """Make the open turn a complete one: `generation` is all of it."""
        ids, logp, versions = generation.token_ids, generation.rollout_logp, generation.versions
        self.turns.append(Turn("assistant", ids, logp, versions, generation.top_k, generation.supports))
        if generation.routed_experts is not None:  # of the prompt or the tool's text before this turn too
            self.routed_experts.append(generation.routed_experts)
        self.finish = "stop" if generation.finish == "abort" else generation.finish
        self.open = None

    def add_tool_turn(self, ids: list[int], output: str) -> None:
        """Add what a tool said."""
        self.turns.append(Turn("tool", ids, [0.0] * len(ids), [-1] * len(ids)))
        self.outputs.append(output)
