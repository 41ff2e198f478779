"""Attempts that an agent plays: what they come to, whatever becomes of the agent. Time is virtual, agents are functions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.agents.http.keys import KeyedEpisodes
from ctpo_megatron.agents.http.server import AgentServer
from ctpo_megatron.agents.play.counted import CountedRunner
from ctpo_megatron.agents.play.environment import AgentEnvironment, Endpoint
from ctpo_megatron.agents.play.runner import AgentFailed, Answer
from ctpo_megatron.agents.play.task import AgentTask
from ctpo_megatron.agents.protocols import AgentAnswer, AgentRequest, EpisodeOver, Message
from ctpo_megatron.config.agents import CommandAgent
from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.errors import NoServerLeft
from ctpo_megatron.record.heartbeat import Depths
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.rollout.protocols import Outcome, Sampling, Score
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.simulation.clock import run_virtually
from ctpo_megatron.types import AttemptId, GroupId, Prompt, Status, Trajectory
from tests.support.agents import ADD, Engine, Hermes, echo, hermes, results
from tests.support.chats import loader

PROMPT = Prompt(5, ({"role": "user", "content": "What is 1 + 1?"},), "2")
CALL, ANSWER = hermes("add", '{"a": 1, "b": 1}'), "It is \\boxed{2}."


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return loader(lambda: tmp_path_factory.mktemp("model") / "m")("qwen2.5")


class Said:
    """A reward that keeps what it was asked."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        self.texts.append(outcome.text)
        return Score(float("\\boxed{2}" in outcome.text), given=outcome.text[-9:])


@dataclass
class Agent:
    """An agent in this process: `plays` is given what asks the model, and the task."""

    plays: Callable[[Callable[..., Awaitable[AgentAnswer]], AgentTask], Awaitable[str | Answer | None]]
    episodes: KeyedEpisodes
    tasks: list[AgentTask] = field(default_factory=list)
    ended: int = 0
    place: Any = field(default_factory=nullcontext)

    async def play(self, task: AgentTask) -> Answer:
        self.tasks.append(task)

        async def ask(messages: list[Message], **options: Any) -> AgentAnswer:
            episode = self.episodes.find(task.api_key)
            assert episode is not None
            return await episode.complete(AgentRequest(tuple(messages), **{"tools": (ADD,), **options}))

        try:
            said = await self.plays(ask, task)
            return said if isinstance(said, Answer) else Answer(said)
        finally:
            self.ended += 1

    async def close(self) -> None:
        pass


class World:
    """An environment around one agent and an engine that says its lines."""

    def __init__(
        self, chat: ChatTokenizer, plays: Any, *lines: str, most_prompt: int = 500, turns: int = 5, **settings: Any
    ) -> None:
        self.engine, self.reward, episodes = Engine(chat, list(lines or (CALL, ANSWER))), Said(), KeyedEpisodes()
        self.agent, self.episodes = Agent(plays, episodes), episodes
        endpoint = Endpoint(AgentServer(episodes), episodes, chat, Hermes(), most_prompt)
        config = CommandAgent(command=("none",), **settings)
        self.depths = Depths(lambda: 0.0)
        runner = CountedRunner(self.agent, self.depths)
        self.environment = AgentEnvironment(endpoint, self.engine, runner, self.reward, config)
        self.sampling = Sampling(1.0, turns, 400)

    async def play(self, sampling: Sampling | None = None) -> Trajectory:
        attempt = self.environment.begin(PROMPT, AttemptId(GroupId(1), 2))
        try:
            return await self.environment.run(attempt, PROMPT, 7, sampling or self.sampling)
        finally:
            assert len(self.episodes) == 0
            assert self.agent.ended == len(self.agent.tasks)


async def two_turns(ask: Any, task: AgentTask) -> str | None:
    """Ask with instructions of its own, call the tool, send its result, and answer with what the model said."""
    messages = [{"role": "system", "content": "Be brief."}, *task.messages]
    first = await ask(messages)
    last = await ask([*messages, echo(first), *results(first, "2")])
    assert last.content == ANSWER
    return None


def test_an_attempt_is_what_the_engine_sampled(chat: ChatTokenizer) -> None:
    world = World(chat, two_turns)
    made = run_virtually(world.play())
    (task,) = world.agent.tasks
    assert task.messages == list(PROMPT.messages)
    assert "2" not in {task.model, task.attempt, *task.messages[0].values()}  # never the answer
    assert (task.attempt, task.timeout_s) == ("g00000001.2", 600.0)
    assert (made.status, made.reward, made.tool_calls, made.prompt_index) == (Status.FINISHED, 1.0, 1, 5)
    assert [turn.role for turn in made.turns] == ["assistant", "tool", "assistant"]
    prompts = [prompt for prompt, _ in world.engine.log]
    assert prompts[0] == made.prompt_ids != made.task_ids == chat.prompt_ids(PROMPT.messages)  # its instructions too
    assert prompts[1] == [*made.prompt_ids, *made.turns[0].token_ids, *made.turns[1].token_ids]
    for turn, (_, sampled) in zip(made.turns[::2], world.engine.log, strict=True):
        streams = sampled.token_ids, sampled.rollout_logp, sampled.versions
        assert (turn.token_ids, turn.rollout_logp, turn.versions) == streams


def test_what_the_agent_says_is_judged_where_it_says_something(chat: ChatTokenizer) -> None:
    async def says(ask: Any, task: AgentTask) -> str:
        await ask(task.messages)
        return "\\boxed{3}"

    world = World(chat, says)
    made = run_virtually(world.play())
    assert world.reward.texts == ["\\boxed{3}"]
    assert (made.reward, made.status) == (0.0, Status.FINISHED)  # it answered, though a call was the model's last word


def test_a_call_that_nothing_followed_is_no_answer(chat: ChatTokenizer) -> None:
    async def stops(ask: Any, task: AgentTask) -> None:
        await ask(task.messages)

    world = World(chat, stops, f"\\boxed{{2}} {CALL}")
    made = run_virtually(world.play())
    assert (made.status, made.reward, world.reward.texts) == (Status.UNANSWERED, 0.0, [""])


def test_a_reward_that_the_agent_brings_is_the_attempts(chat: ChatTokenizer) -> None:
    async def knows(ask: Any, task: AgentTask) -> Answer:
        await ask(task.messages)
        return Answer(reward=0.25)

    world = World(chat, knows)
    made = run_virtually(world.play())
    assert (made.reward, made.accuracy, made.undecided, world.reward.texts) == (0.25, None, False, [])
    assert made.status is Status.FINISHED  # though a call was the model's last word


async def fails_late(ask: Any, task: AgentTask) -> None:
    await two_turns(ask, task)
    raise AgentFailed("it broke")


def test_the_failure_of_an_agent_is_the_attempts_where_it_is_said_so(chat: ChatTokenizer) -> None:
    world = World(chat, fails_late)
    with pytest.raises(AgentFailed, match="it broke"):
        run_virtually(world.play())
    assert run_virtually(World(chat, fails_late, on_failure="judge").play()).reward == 1.0

    async def fails(ask: Any, task: AgentTask) -> None:
        raise AgentFailed("it never began")

    with pytest.raises(AgentFailed, match="never began"):  # there is nothing to judge
        run_virtually(World(chat, fails, on_failure="judge").play())


def test_an_agent_that_breaks_on_the_attempts_bounds_has_not_failed(chat: ChatTokenizer) -> None:
    async def asks_on(ask: Any, task: AgentTask) -> None:
        messages = task.messages
        try:
            while True:
                answer = await ask(messages)
                outputs = results(answer, *["2"] * len(answer.calls))  # a call that was cut off is none
                messages = [*messages, echo(answer), *outputs]
        except EpisodeOver as over:
            raise AgentFailed("exit code 1") from over

    world = World(chat, asks_on, CALL, turns=3)
    made = run_virtually(world.play())
    assert (made.status, len(world.engine.log)) == (Status.MAX_TURNS, 3)
    longer = World(chat, asks_on, CALL, turns=99)
    assert run_virtually(longer.play()).status is Status.LENGTH


def test_a_first_request_that_is_too_long_says_what_to_change(chat: ChatTokenizer) -> None:
    async def talks(ask: Any, task: AgentTask) -> None:
        try:
            await ask([{"role": "system", "content": "x" * 2000}, *task.messages])
        except EpisodeOver as over:
            raise AgentFailed("exit code 1") from over

    with pytest.raises(AgentFailed, match=r"longer than data\.max_prompt_tokens=500"):
        run_virtually(World(chat, talks).play())


def test_a_lost_agent_ends_with_its_time(chat: ChatTokenizer) -> None:
    async def is_lost(ask: Any, task: AgentTask) -> None:
        await two_turns(ask, task)
        playing.append(world.depths.now()["an agent"][0])
        await asyncio.Event().wait()

    async def timed(world: World, sampling: Sampling | None = None) -> tuple[Trajectory, float]:
        made = await world.play(sampling)
        return made, asyncio.get_running_loop().time()

    playing: list[int] = []
    world = World(chat, is_lost, timeout_s=30.0)
    made, took_s = run_virtually(timed(world))
    assert (playing, world.depths.now()["an agent"][0]) == ([1], 0)  # what the report of a stall says
    assert (made.status, made.reward, took_s) == (Status.DEADLINE, 1.0, 35.0)
    assert made.seconds == took_s
    shorter = Sampling(1.0, 5, 400, deadline_s=10.0)
    made, took_s = run_virtually(timed(World(chat, is_lost, timeout_s=30.0), shorter))
    assert (made.status, took_s) == (Status.DEADLINE, 15.0)


def test_what_the_engine_raises_is_heard_whatever_the_agent_makes_of_it(chat: ChatTokenizer) -> None:
    async def swallows(ask: Any, task: AgentTask) -> str:
        try:
            await ask(task.messages)
        except NoServerLeft:
            await asyncio.sleep(1e6)
        return "fine"

    world = World(chat, swallows)

    async def no_server(*_args: Any, **_options: Any) -> Any:
        raise NoServerLeft("none")

    world.engine.generate = no_server  # type: ignore[method-assign]
    with pytest.raises(NoServerLeft):
        run_virtually(world.play())


def test_an_interrupted_attempt_is_made_anew_and_a_whole_one_is_kept(chat: ChatTokenizer, tmp_path: Path) -> None:
    world = World(chat, two_turns)
    config = RolloutConfig(tool=None)

    async def play() -> None:
        journal = Journal(tmp_path, "r")
        journal.published(0, "weights")
        for version in (1, 2):
            journal.published(version, "weights")
        rollouter = Rollouter(world.environment, config, journal)
        world.engine.pause = asyncio.Event()
        group = asyncio.ensure_future(rollouter.group(PROMPT, GroupId(0), size=1, sampling=world.sampling))
        async with asyncio.timeout(60):
            while not world.agent.tasks:
                await asyncio.sleep(0)
        await rollouter.interrupt()
        group.cancel()
        await asyncio.gather(group, return_exceptions=True)
        assert len(world.episodes) == 0
        assert (world.agent.ended, len(world.engine.log)) == (1, 0)
        world.engine.pause.set()
        again = await rollouter.group(PROMPT, GroupId(0), size=1, sampling=world.sampling)
        assert world.agent.ended == 2
        kept = await rollouter.group(PROMPT, GroupId(0), size=1, sampling=world.sampling)
        assert world.agent.ended == 2
        assert repr(kept.trajectories) == repr(again.trajectories)
        other = Prompt(5, ({"role": "user", "content": "What is 2 + 2?"},), "4")
        await rollouter.group(other, GroupId(0), size=1, sampling=world.sampling)
        assert world.agent.ended == 3
        journal.close()

    asyncio.run(play())
