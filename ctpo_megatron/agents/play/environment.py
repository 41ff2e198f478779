"""Attempts that an agent plays: each has a conversation of its own behind a key of its own.

    begin -> key, agent -> requests (agents.http -> agents.conversation) -> the agent ends -> verdict -> Trajectory

An agent cannot be stopped half-way and go on elsewhere, so an attempt that is interrupted ends its agent and is made anew; whole
ones are kept as all others are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ctpo_megatron.agents.conversation.conversation import Bounds, Conversation
from ctpo_megatron.agents.conversation.trajectory import trajectory_of, written
from ctpo_megatron.agents.conversation.tree import Tree
from ctpo_megatron.agents.http.keys import KeyedEpisodes, new_key
from ctpo_megatron.agents.http.server import AgentServer
from ctpo_megatron.agents.play.overseen import Overseen
from ctpo_megatron.agents.play.runner import AgentFailed, AgentRunner, Answer
from ctpo_megatron.agents.play.task import AgentTask
from ctpo_megatron.config.agents import LocalAgent
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.judged import outcome_as, with_score
from ctpo_megatron.rollout.protocols import CallParser, Chat, Generator, Reward, Sampling, Score, TalkChat
from ctpo_megatron.types import AttemptId, Prompt, Status, Trajectory

NOTHING = Answer()
GRACE_S = 5.0  # after its time is over: for the turn that it is in to reach the agent, and for the agent to end itself


class AgentChat(Chat, TalkChat, Protocol):
    """Between text and tokens, for prompts and for conversations of agents."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where agents are served: all attempts of a run share it.

    `max_prompt_tokens`: of an agent's first request, its instructions and tools included.
    """

    server: AgentServer
    episodes: KeyedEpisodes
    chat: AgentChat
    parser: CallParser
    max_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class _End:
    """How an agent ended: with an answer, by a failure of its own, or since its time was over."""

    answer: Answer = NOTHING
    failure: AgentFailed | None = None
    late: bool = False


class AgentEnvironment:
    """Attempts that are played by agents (`rollout.protocols.Environment`), on the inference engine behind `generator`."""

    def __init__(
        self,
        endpoint: Endpoint,
        generator: Generator,
        runner: AgentRunner,
        reward: Reward,
        config: LocalAgent,
    ) -> None:
        self._endpoint, self._generator = endpoint, generator
        self._runner, self._reward, self._config = runner, reward, config
        self._rendered: tuple[Prompt, list[int]] | None = None  # the newest prompt: all attempts of a group begin with it

    def begin(self, prompt: Prompt, attempt: AttemptId) -> Attempt:
        """Returns an attempt at `prompt`. What the agent makes of the prompt, its first request says."""
        if self._rendered is None or self._rendered[0] is not prompt:
            self._rendered = prompt, self._endpoint.chat.prompt_ids(prompt.messages)
        return Attempt(attempt, prompt.index, self._rendered[1])

    async def run(
        self,
        attempt: Attempt,
        prompt: Prompt,
        session: int,
        sampling: Sampling,
        note: Callable[[Attempt], None] = lambda _attempt: None,
    ) -> Trajectory:
        """Let an agent play `attempt` from its beginning; returns what it came to, judged. `note` is never called.

        Raises AgentFailed where the agent failed and that is no part of the attempt (`rollout.agent.on_failure`), and what the
        engine raised meanwhile.
        """
        attempt.seconds = 0.0
        async with self._runner.place:
            attempt.begin_work()
            try:
                made, answer = await self._played(attempt, prompt, session, sampling)
                score = await self._score(prompt, made, answer)
            finally:
                attempt.end_work()
        attempt.status = made.status
        return replace(with_score(made, score), seconds=attempt.seconds, task_ids=attempt.prompt_ids)

    async def _score(self, prompt: Prompt, made: Trajectory, answer: Answer) -> Score:
        """Returns the reward that the agent brought with it, else that of the text of its `answer`, which has one here."""
        if answer.reward is not None:
            return Score(answer.reward)
        return await self._reward.score(prompt, outcome_as(answer.text or "", made, self._endpoint.chat))

    async def _played(self, attempt: Attempt, prompt: Prompt, session: int, sampling: Sampling) -> tuple[Trajectory, Answer]:
        """Returns the trajectory without its reward, and what is to be judged."""
        endpoint, tree, key = self._endpoint, Tree(str(attempt.id)), new_key()
        limit_s = min(self._config.timeout_s, sampling.deadline_s or self._config.timeout_s)
        deadline = asyncio.get_running_loop().time() + limit_s
        bounds = Bounds(sampling, endpoint.max_prompt_tokens + sampling.max_response_tokens, deadline)
        conversation = Conversation(tree, self._generator, endpoint.chat, endpoint.parser, bounds, session=session)
        overseen = Overseen(conversation)
        endpoint.episodes.add(key, overseen)
        try:
            end = await self._agent(self._task(attempt.id, prompt, key, limit_s), overseen, deadline + GRACE_S)
        finally:
            endpoint.episodes.remove(key)
            await conversation.close()
        if end.failure is not None and not self._counts(tree):
            raise AgentFailed(f"{end.failure}{_refusal(tree, endpoint.max_prompt_tokens)}") from end.failure
        made = trajectory_of(tree, endpoint.chat, attempt.id, prompt.index)
        if end.late:
            made.status = Status.DEADLINE
        if made.status is Status.UNANSWERED:
            if end.answer == NOTHING:
                return made, Answer("")  # what was said before a call that nothing followed is no answer
            made.status = Status.FINISHED  # harnesses that answer by a call of a tool
        return made, end.answer if end.answer != NOTHING else Answer(written(tree, endpoint.chat))

    def _counts(self, tree: Tree) -> bool:
        """Whether what was sampled is judged though the agent failed: its bounds may have made it fail, or the model."""
        sampled = any(turn.whole for turn in tree.turns)
        return sampled and (tree.refused is not None or self._config.on_failure == "judge")

    def _task(self, attempt: AttemptId, prompt: Prompt, key: str, limit_s: float) -> AgentTask:
        server = self._endpoint.server
        return AgentTask(
            openai_url=server.openai_url(key),
            anthropic_url=server.anthropic_url(key),
            api_key=key,
            model=self._config.model,
            messages=list(prompt.messages),
            attempt=str(attempt),
            timeout_s=limit_s,
        )

    async def _agent(self, task: AgentTask, overseen: Overseen, until: float) -> _End:
        """Let an agent play until it ends, its time is over or the engine fails, whose error comes out."""
        playing = asyncio.ensure_future(self._runner.play(task))
        waited_for: list[asyncio.Future[Any]] = [playing, overseen.trouble]
        left_s = until - asyncio.get_running_loop().time()
        try:
            await asyncio.wait(waited_for, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            late = not playing.done()
        finally:
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)
        if overseen.trouble.done():
            raise overseen.trouble.result()
        if late:
            return _End(late=True)
        error = playing.exception()
        if isinstance(error, AgentFailed):
            return _End(failure=error)
        return _End(answer=playing.result())


def _refusal(tree: Tree, max_prompt_tokens: int) -> str:
    """What to change where an agent's first request was refused for its length."""
    if tree.refused is not Status.LENGTH or any(turn.whole for turn in tree.turns):
        return ""
    return (
        f". Its first request, instructions and tools included, was longer than data.max_prompt_tokens={max_prompt_tokens} and "
        "rollout.max_response_tokens together: raise these, or let the agent say less"
    )
