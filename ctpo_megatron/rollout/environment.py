"""One trajectory: the model writes, its code runs, it reads the output, until it answers or a budget ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise

from ctpo_megatron.rollout.assistant import sample_turn
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.judged import outcome_of, trajectory_of, with_score
from ctpo_megatron.rollout.protocols import Chat, Generator, PastCall, Reward, Sampling, ToolRunner
from ctpo_megatron.rollout.tools import extract_code, opened
from ctpo_megatron.types import AttemptId, Prompt, Status, Trajectory


class ToolEnvironment:
    """Multi-turn generation with a code tool; single-turn where `tool` is None."""

    def __init__(self, generator: Generator, chat: Chat, tool: ToolRunner | None, reward: Reward) -> None:
        self._generator = generator
        self._chat = chat
        self._tool = tool
        self._reward = reward
        self._rendered: tuple[Prompt, list[int]] | None = None  # the newest prompt: all attempts of a group begin with it

    def begin(self, prompt: Prompt, attempt: AttemptId) -> Attempt:
        """Returns an attempt at `prompt` of which nothing is done yet."""
        if self._rendered is None or self._rendered[0] is not prompt:
            self._rendered = prompt, self._chat.prompt_ids(prompt.messages)
        return Attempt(attempt, prompt.index, self._rendered[1])

    async def run(
        self,
        attempt: Attempt,
        prompt: Prompt,
        session: int,
        sampling: Sampling,
        note: Callable[[Attempt], None] = lambda _attempt: None,
    ) -> Trajectory:
        """Play `attempt` from where it is to its end; returns it, judged by what the assistant itself wrote, not its programs.

        `note` hears of each tool's turn. Whatever ends this early, `attempt` holds all that was done, and another call goes on
        from there.
        """
        deadline = None
        if sampling.deadline_s is not None:
            deadline = asyncio.get_running_loop().time() + sampling.deadline_s - attempt.seconds
        attempt.begin_work()
        try:
            if attempt.status is None:
                async with nullcontext() if self._tool is None else opened(self._tool, self._past(attempt)) as tool:
                    attempt.status = await self._play(attempt, tool, session, sampling, note, deadline)
            score = await self._reward.score(prompt, outcome_of(attempt, self._chat))
        finally:
            attempt.end_work()
        return with_score(trajectory_of(attempt, self._chat), score)

    def _past(self, attempt: Attempt) -> list[PastCall]:
        """The programs that the tool has run for `attempt`."""
        asked = [turn for turn, after in pairwise(attempt.turns) if after.role == "tool"]
        codes = [extract_code(self._chat.decode(turn.token_ids)) or "" for turn in asked]
        return [PastCall(code, output) for code, output in zip(codes, attempt.outputs, strict=True)]

    async def _play(
        self,
        attempt: Attempt,
        tool: ToolRunner | None,
        session: int,
        sampling: Sampling,
        note: Callable[[Attempt], None],
        deadline: float | None,
    ) -> Status:
        if sampling.max_turns < 1:
            raise ValueError(f"max_turns={sampling.max_turns}; allowed: 1 or more")
        while True:
            if not attempt.awaits_tool:
                await sample_turn(self._generator, self._chat, attempt, session, sampling, deadline)
            if attempt.finish == "length":
                return Status.LENGTH
            if attempt.finish == "deadline":
                return Status.DEADLINE
            code = None
            if tool is not None:
                code = extract_code(self._chat.decode(attempt.turns[-1].token_ids))
            if tool is None or code is None:
                return Status.FINISHED
            if len(attempt.assistant_turns) >= sampling.max_turns:
                return Status.MAX_TURNS
            limit = asyncio.timeout_at(deadline)
            try:
                async with limit:
                    added = await self._tool_turn(tool, attempt, code, sampling)
            except TimeoutError:
                if not limit.expired():  # it is the tool's own
                    raise
                return Status.DEADLINE
            if not added:
                return Status.LENGTH
            note(attempt)

    async def _tool_turn(self, tool: ToolRunner, attempt: Attempt, code: str, sampling: Sampling) -> bool:
        """Run `code` and add its output; returns False, adding nothing, where no room for an answer would be left."""
        result = await tool.run(code)
        attempt.tool_calls += 1
        attempt.tool_errors += not result.ok
        ids = self._chat.tool_ids(result.output, earlier=attempt.outputs, end=attempt.turns[-1].token_ids[-1])
        if len(ids) >= sampling.max_response_tokens - attempt.response_length:
            return False
        attempt.add_tool_turn(ids, result.output)
        return True
