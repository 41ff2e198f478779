"""One trajectory: the model writes, its code runs, it reads the output, until it answers or a budget ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.protocols import Chat, Generator, Reward, Sampling, ToolRunner
from ctpo_megatron.rollout.tools import extract_code
from ctpo_megatron.types import AttemptId, Generation, Prompt, Status, Trajectory, Turn


class ToolEnvironment:
    """Multi-turn generation with a code tool; single-turn where `tool` is None."""

    def __init__(self, generator: Generator, chat: Chat, tool: ToolRunner | None, reward: Reward) -> None:
        self._generator = generator
        self._chat = chat
        self._tool = tool
        self._reward = reward

    async def run(self, prompt: Prompt, attempt: AttemptId, session: int, sampling: Sampling) -> Trajectory:
        """Returns one attempt at `prompt`, judged by what the assistant itself wrote, not by what its programs printed."""
        begun = time.monotonic()
        made = _Attempt(self._chat.prompt_ids(prompt.messages), sampling.max_response_tokens)
        status = await self._play(made, session, sampling)
        score = await self._reward.score(prompt, "\n".join(made.written))
        return Trajectory(
            id=attempt,
            prompt_index=prompt.index,
            prompt_ids=made.prompt_ids,
            turns=made.turns,
            status=status,
            text=self._chat.decode(made.tokens[len(made.prompt_ids) :], special=True),
            reward=score.reward,
            undecided=score.undecided,
            tool_calls=made.tool_calls,
            tool_errors=made.tool_errors,
            seconds=time.monotonic() - begun,
            routed_experts=np.concatenate(made.routed_experts) if made.routed_experts else None,
        )

    async def _play(self, attempt: _Attempt, session: int, sampling: Sampling) -> Status:
        for turn in range(1, sampling.max_turns + 1):
            finish = await self._assistant_turn(attempt, session, sampling)
            if finish == "length":
                return Status.LENGTH
            code = extract_code(attempt.written[-1]) if self._tool is not None else None
            if self._tool is None or code is None:
                return Status.FINISHED
            if turn == sampling.max_turns:
                return Status.MAX_TURNS
            if not await self._tool_turn(self._tool, attempt, code):
                return Status.LENGTH
        raise ValueError(f"max_turns={sampling.max_turns}; allowed: 1 or more")

    async def _assistant_turn(self, attempt: _Attempt, session: int, sampling: Sampling) -> str:
        """Add a turn of the model; returns why it ended."""
        stop = self._chat.stop_token_ids
        generation = await self._generator.generate(
            attempt.tokens,
            max_new_tokens=attempt.left,
            temperature=sampling.temperature,
            stop_token_ids=stop,
            session=session,
            recorded=sum(map(len, attempt.routed_experts)) if sampling.record else None,
        )
        _check(generation, attempt.left, stop)
        attempt.add(Turn("assistant", generation.token_ids, generation.rollout_logp, generation.versions, generation.top_k))
        if generation.routed_experts is not None:  # of the prompt or the tool's text before this turn too
            attempt.routed_experts.append(generation.routed_experts)
        attempt.written.append(self._chat.decode(generation.token_ids))
        return generation.finish

    async def _tool_turn(self, tool: ToolRunner, attempt: _Attempt, code: str) -> bool:
        """Run `code` and add its output; returns False, adding nothing, where no room for an answer would be left."""
        result = await tool.run(code)
        attempt.tool_calls += 1
        attempt.tool_errors += not result.ok
        ids = self._chat.tool_ids(result.output, earlier=attempt.outputs, end=attempt.tokens[-1])
        if len(ids) >= attempt.left:
            return False
        attempt.add(Turn("tool", ids, [0.0] * len(ids), [-1] * len(ids)))
        attempt.outputs.append(result.output)
        return True


@dataclass(slots=True)
class _Attempt:
    """A trajectory in the making."""

    prompt_ids: list[int]
    budget: int  # tokens after the prompt
    tokens: list[int] = field(init=False)  # prompt and turns
    turns: list[Turn] = field(default_factory=list)
    written: list[str] = field(default_factory=list)  # text of each assistant turn
    outputs: list[str] = field(default_factory=list)  # what tools said
    routed_experts: list[NDArray[np.signedinteger]] = field(default_factory=list)  # of all tokens but the last, turn by turn
    tool_calls: int = 0
    tool_errors: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_ids)

    @property
    def left(self) -> int:
        return self.budget - (len(self.tokens) - len(self.prompt_ids))

    def add(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.tokens += turn.token_ids


def _check(generation: Generation, allowed: int, stop: list[int]) -> None:
    """Raise RolloutError where an answer of the engine would make a wrong sample."""
    ids, finish = generation.token_ids, generation.finish
    if not 1 <= len(ids) <= allowed:
        raise RolloutError(f"the engine answered with {len(ids)} tokens; it was asked for 1 to {allowed}")
    if finish not in ("stop", "length"):
        raise RolloutError(f"the engine ended a generation with {finish!r}; known: stop, length")
    if finish == "stop" and ids[-1] not in stop:
        raise RolloutError(f"the engine ended a generation with 'stop' after token {ids[-1]}; stop tokens are {stop}")
