"""One trajectory in a world: the model writes a turn, the world answers, until it is done or a budget ends.

Sampled ids stay as they were sampled. What the world says becomes what the chat template writes between two turns of the
assistant, and names of special tokens in it stay plain text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.assistant import sample_turn
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.judged import trajectory_of
from ctpo_megatron.rollout.protocols import CallParser, Generator, Sampling, TalkChat
from ctpo_megatron.rollout.worlds.load import static_tools
from ctpo_megatron.rollout.worlds.protocols import GroupRewards, StepResult, World, Worlds
from ctpo_megatron.types import AttemptId, Parsed, Prompt, Status, Trajectory

Message = dict[str, Any]
Note = Callable[[Attempt], None]


class WorldEnvironment:
    """Implements `rollout.protocols.Environment` over worlds of one kind. `step_timeout_s` bounds each call of a world."""

    def __init__(
        self, generator: Generator, chat: TalkChat, parser: CallParser, worlds: Worlds, *, step_timeout_s: float = 60.0
    ) -> None:
        self._generator = generator
        self._chat = chat
        self._parser = parser
        self._worlds = worlds
        self._limit = step_timeout_s

    def begin(self, prompt: Prompt, attempt: AttemptId) -> Attempt:
        """Returns an attempt of which nothing is done yet. Its world comes with its first turn.

        Its prompt is that of the data with the tools that the world's class has; one that adds words to it when it begins makes
        it longer then.
        """
        return Attempt(attempt, prompt.index, self._chat.talk_ids(prompt.messages, tools=static_tools(self._worlds)))

    async def run(
        self, attempt: Attempt, prompt: Prompt, session: int, sampling: Sampling, note: Note = lambda _attempt: None
    ) -> Trajectory:
        """Play `attempt` from where it is to its end; returns it with the sum of its steps' rewards.

        An attempt that has turns is played to a new world again; where that world is another one, or does not say the same, the
        attempt begins anew. `note` hears of each of the world's turns.
        """
        deadline = None
        if sampling.deadline_s is not None:
            deadline = asyncio.get_running_loop().time() + sampling.deadline_s - attempt.seconds
        attempt.begin_work()
        episode: _Episode | None = None
        try:
            episode = await self._resumed(attempt, prompt, note)
            if attempt.status is None:
                attempt.status = await self._play(attempt, episode, session, sampling, note, deadline)
        finally:
            attempt.end_work()
            if episode is not None:
                await episode.close()
        return replace(trajectory_of(attempt, self._chat), reward=episode.reward)

    async def judge(self, prompt: Prompt, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Returns a whole group with the rewards that its world gives it as a group; as it is where the world gives none."""
        world = self._worlds()
        try:
            if not isinstance(world, GroupRewards):
                return trajectories
            async with asyncio.timeout(self._limit):
                rewards = [float(each) for each in await world.group_rewards(prompt, trajectories)]
        finally:
            await _close(world, self._limit)
        if len(rewards) != len(trajectories) or not np.isfinite(rewards).all():
            raise RolloutError(
                f"group_rewards of {type(world).__name__} returned {rewards}; needed: {len(trajectories)} finite numbers"
            )
        return [replace(each, reward=reward) for each, reward in zip(trajectories, rewards, strict=True)]

    async def _resumed(self, attempt: Attempt, prompt: Prompt, note: Note) -> _Episode:
        """Returns the episode of `attempt`, at the place at which that is."""
        episode = await self._opened(prompt)
        if not attempt.turns and attempt.open is None:
            attempt.open_with(episode.prompt_ids)
            return episode
        try:
            same = episode.world.replayable and attempt.prompt_ids == episode.prompt_ids
            if same and await self._replayed(attempt, episode):
                return episode
        except BaseException:
            await episode.close()
            raise
        await episode.close()
        attempt.begin_anew()
        note(attempt)
        episode = await self._opened(prompt)
        attempt.open_with(episode.prompt_ids)
        return episode

    async def _replayed(self, attempt: Attempt, episode: _Episode) -> bool:
        """Play the recorded turns to a new world; returns whether it says what was said then."""
        for place, turn in enumerate(attempt.turns):
            if turn.role != "assistant":
                continue
            following = attempt.turns[place + 1] if place + 1 < len(attempt.turns) else None
            if following is None and (attempt.status in (None, Status.DEADLINE) or attempt.finish != "stop"):
                return True  # the world has not heard of this turn
            ids = await self._answer(episode, turn.token_ids)
            if following is not None and ids != following.token_ids:
                return False
        return True

    async def _play(
        self, attempt: Attempt, episode: _Episode, session: int, sampling: Sampling, note: Note, deadline: float | None
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
            limit = asyncio.timeout_at(deadline)
            try:
                async with limit:
                    ids = await self._answer(episode, attempt.turns[-1].token_ids)
            except TimeoutError:
                if not limit.expired():  # it is the world's own
                    raise
                return Status.DEADLINE
            attempt.tool_calls += episode.calls
            if ids is None:
                return Status.FINISHED
            if len(attempt.assistant_turns) >= sampling.max_turns:
                return Status.MAX_TURNS
            if len(ids) >= sampling.max_response_tokens - attempt.response_length:
                return Status.LENGTH
            attempt.add_tool_turn(ids, episode.said)
            note(attempt)

    async def _opened(self, prompt: Prompt) -> _Episode:
        world = self._worlds()
        try:
            async with asyncio.timeout(self._limit):
                opening = await world.reset(prompt)
            messages = [*prompt.messages, *([] if opening is None else [{"role": "user", "content": opening}])]
            tools = list(world.tools)
            return _Episode(world, messages, tools, self._chat.talk_ids(messages, tools=tools), self._limit)
        except BaseException:
            await _close(world, self._limit)
            raise

    async def _answer(self, episode: _Episode, token_ids: Sequence[int]) -> list[int] | None:
        """Token ids of what the world says to a turn; None where the episode is over."""
        end = token_ids[-1]
        ended = end in self._chat.stop_token_ids
        turn = self._parser.parse(self._chat.decode(token_ids[:-1] if ended else token_ids, special=True), episode.tools)
        before = list(episode.messages)
        new = await episode.step(turn)
        if new is None:
            return None
        return self._chat.tail_ids(before, new, end=end, tools=episode.tools)


class _Episode:
    """A world, what was said in it, and what it gave by now."""

    def __init__(self, world: World, messages: list[Message], tools: list[Message], prompt_ids: list[int], limit: float) -> None:
        self.world, self.messages, self.tools, self.prompt_ids, self._limit = world, messages, tools, prompt_ids, limit
        self.reward = 0.0
        self.calls = 0  # of the newest turn
        self.said = ""  # by the world, to the newest turn
        self._turns = 0

    async def step(self, turn: Parsed) -> list[Message] | None:
        """The messages with which the world answers `turn`; None: it is done. Raises RolloutError for an answer that is none."""
        async with asyncio.timeout(self._limit):
            result = await self.world.step(turn)
        self._check(result, turn)
        self._turns += 1
        self.reward += result.reward or 0.0
        self.calls = len(turn.calls)
        if result.done:
            return None
        names = [f"call{self._turns:04d}{place:02d}" for place in range(len(turn.calls))]
        new: list[Message] = [
            {"role": "tool", "content": text, "tool_call_id": name} for text, name in zip(result.results, names, strict=True)
        ]
        new += [] if result.text is None else [{"role": "user", "content": result.text}]
        self.said = "\n".join(str(message["content"]) for message in new)
        self.messages += [_spoken(turn, names), *new]
        return new

    async def close(self) -> None:
        """Close the world."""
        await _close(self.world, self._limit)

    def _check(self, result: Any, turn: Parsed) -> None:
        name = f"step of {type(self.world).__name__}"
        if not isinstance(result, StepResult):
            raise RolloutError(f"{name} returned a {type(result).__name__}; needed: a StepResult")
        if result.reward is not None and not np.isfinite(result.reward):
            raise RolloutError(f"{name} gave the reward {result.reward}; needed: a finite number, or None")
        if not result.done and len(result.results) != len(turn.calls):
            raise RolloutError(
                f"{name} answered {len(turn.calls)} calls with {len(result.results)} results; needed: one for each"
            )
        if not result.done and not turn.calls and result.text is None:
            raise RolloutError(f"{name} says nothing and is not done; needed: text, results or done=True")


def _spoken(turn: Parsed, names: list[str]) -> Message:
    """A turn of the assistant as a message."""
    calls = [
        {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for name, call in zip(names, turn.calls, strict=True)
    ]
    return {"role": "assistant", "content": turn.content} | ({"tool_calls": calls} if calls else {})


async def _close(world: World, limit: float) -> None:
    async with asyncio.timeout(limit):
        await world.close()
