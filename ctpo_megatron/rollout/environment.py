"""One trajectory: the model writes, its code runs, it reads the output, until it answers or a budget ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise

import numpy as np

from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.judged import with_score
from ctpo_megatron.rollout.protocols import Chat, Generator, Outcome, PastCall, Reward, Sampling, ToolRunner
from ctpo_megatron.rollout.tools import extract_code, opened
from ctpo_megatron.types import AttemptId, Generation, Prompt, Status, Trajectory


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
        made = Trajectory(
            id=attempt.id,
            prompt_index=attempt.prompt_index,
            prompt_ids=attempt.prompt_ids,
            turns=attempt.turns,
            status=attempt.status,
            text=self._chat.decode(attempt.tokens[len(attempt.prompt_ids) :], special=True),
            tool_calls=attempt.tool_calls,
            tool_errors=attempt.tool_errors,
            seconds=attempt.seconds,
            routed_experts=np.concatenate(attempt.routed_experts) if attempt.routed_experts else None,
        )
        return with_score(made, score)

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
                await self._assistant_turn(attempt, session, sampling, deadline)
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

    async def _assistant_turn(self, attempt: Attempt, session: int, sampling: Sampling, deadline: float | None) -> None:
        """Add a turn of the model, or the rest of one that is open."""
        stop, left = self._chat.stop_token_ids, sampling.max_response_tokens - attempt.response_length
        if attempt.open is None:
            attempt.open = Generation()
        generation = await self._generator.generate(
            attempt.tokens,
            attempt.open,
            max_new_tokens=left,
            temperature=sampling.temperature,
            truncation=sampling.truncation,
            stop_token_ids=stop,
            session=session,
            recorded=attempt.recorded if sampling.record else None,
            deadline=deadline,
        )
        check_generation(generation, left, stop)
        attempt.close_turn(generation)

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


def outcome_of(attempt: Attempt, chat: Chat) -> Outcome:
    """Returns what a reward sees of an attempt that has come to its end."""
    written = [chat.decode(turn.token_ids) for turn in attempt.assistant_turns]
    said = {"assistant": iter(written), "tool": iter(attempt.outputs)}
    return Outcome(
        "\n".join(written),
        tuple((turn.role, next(said[turn.role], "")) for turn in attempt.turns),
        attempt.response_length,
        attempt.tool_calls,
        attempt.tool_errors,
        attempt.status or Status.FINISHED,
    )


def check_generation(generation: Generation, allowed: int, stop: list[int]) -> None:
    """Raise RolloutError where an answer of the engine would make a wrong sample."""
    ids, finish = generation.token_ids, generation.finish
    if not 1 <= len(ids) <= allowed:
        raise RolloutError(f"the engine answered with {len(ids)} tokens; it was asked for 1 to {allowed}")
    if finish not in ("stop", "length", "deadline"):
        raise RolloutError(f"the engine ended a generation with {finish!r}; known: stop, length, deadline")
    if finish == "length" and len(ids) < allowed:
        raise RolloutError(
            f"the engine ended a generation with 'length' after {len(ids)} of {allowed} tokens: its context or its KV cache is "
            "smaller than the run's longest sample. Lower rollout.max_response_tokens, or raise rollout.engine.max_total_tokens"
        )
    if finish == "stop" and ids[-1] not in stop:
        raise RolloutError(f"the engine ended a generation with 'stop' after token {ids[-1]}; stop tokens are {stop}")
