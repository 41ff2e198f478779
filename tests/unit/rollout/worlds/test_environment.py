"""Attempts in worlds: what is sampled and said, budgets, interruptions, rewards of a group; the parser is SGLang's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.engine.sglang.parsers import SGLangCallParser
from ctpo_megatron.errors import ConfigError, RolloutError
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.rollout.worlds.environment import WorldEnvironment
from ctpo_megatron.rollout.worlds.load import load_worlds
from ctpo_megatron.rollout.worlds.protocols import StepResult
from ctpo_megatron.types import Generation, Prompt, Status, Trajectory
from tests.support.trajectories import ATTEMPT, GROUP

END = ord("|")
PROMPT = Prompt(4, ({"role": "user", "content": "q"},), "7")
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
LOOK = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'


class Letters:
    """A letter is its code; | ends a turn; what others say stands in braces, with the first letter of its role."""

    stop_token_ids = [END]  # noqa: RUF012

    def talk_ids(self, messages, *, tools=(), thinking=None):
        return [ord(c) for c in "".join(message["content"] for message in messages) + "T" * len(tools)]

    def tail_ids(self, before, new, *, end, tools=(), thinking=None):
        assert end == END
        return [ord(c) for message in new for c in f"{{{message['role'][0]}:{message['content']}}}"]

    def decode(self, ids, *, special=False):
        return "".join(chr(i) for i in ids if special or i != END)


class Script:
    """An engine that says its lines in turn; with None it never ends."""

    def __init__(self, *lines: str | None) -> None:
        self.lines, self.seen = list(lines), []

    async def generate(self, input_ids, done, *, max_new_tokens, **options):
        self.seen.append("".join(map(chr, input_ids)))
        line = self.lines[len(self.seen) - 1]
        if line is None:
            done.token_ids.append(ord("?"))
            await asyncio.Event().wait()
        ids = [ord(c) for c in line] + [END]
        finish = "stop" if len(ids) <= max_new_tokens else "length"
        return Generation(ids[:max_new_tokens], [-0.5] * len(ids[:max_new_tokens]), [1] * len(ids[:max_new_tokens]), finish)


class Guess:
    """A number to be found; `look` tells it."""

    tools: Any = ()
    replayable = True
    made: list[Guess]

    def __init__(self, secret: int = 7) -> None:
        self.secret, self.closed, self.heard = secret, 0, []

    async def reset(self, prompt: Prompt) -> str | None:
        return None

    async def step(self, turn) -> StepResult:
        self.heard.append(turn)
        if turn.calls:
            return StepResult(results=("7",) * len(turn.calls), reward=-0.25)
        if turn.content == str(self.secret):
            return StepResult(reward=1.0, done=True)
        return StepResult("higher")

    async def close(self) -> None:
        self.closed += 1


@cache
def parser() -> SGLangCallParser:
    return SGLangCallParser("hermes", thinks=True)


def environment(engine: Script, kind: Callable[[], Any] = Guess, **options: Any) -> tuple[WorldEnvironment, list[Any]]:
    made: list[Any] = []

    def worlds() -> Any:
        made.append(kind())
        return made[-1]

    return WorldEnvironment(engine, Letters(), parser(), worlds, **options), made


def play(
    *lines: str, kind: Callable[[], Any] = Guess, budget: int = 1000, turns: int = 5
) -> tuple[Trajectory, Script, list[Any]]:
    engine = Script(*lines)
    played, made = environment(engine, kind)
    sampling = Sampling(1.0, turns, budget)
    trajectory = asyncio.run(played.run(played.begin(PROMPT, ATTEMPT), PROMPT, 9, sampling))
    assert [world.closed for world in made] == [1]
    return trajectory, engine, made


def test_turns_of_the_model_and_the_world() -> None:
    trajectory, engine, _ = play("3", "<think>so</think>7")
    assert trajectory.text == "3|{u:higher}<think>so</think>7|"
    assert engine.seen == ["q", "q3|{u:higher}"]
    assert (trajectory.status, trajectory.reward, trajectory.tool_calls) == (Status.FINISHED, 1.0, 0)
    assert [set(turn.versions) for turn in trajectory.turns] == [{1}, {-1}, {1}]


class WithTools(Guess):
    tools = TOOLS


def test_parallel_calls_get_one_result_each_and_rewards_are_added_up() -> None:
    trajectory, engine, (world,) = play(LOOK + LOOK, "7", kind=WithTools)
    assert engine.seen == ["qT", f"qT{LOOK}{LOOK}|{{t:7}}{{t:7}}"]
    assert (trajectory.tool_calls, trajectory.reward) == (2, 0.75)
    assert [len(turn.calls) for turn in world.heard] == [2, 0]
    assert play(LOOK, "7")[0].text.startswith(f"{LOOK}|{{u:higher}}"), "a world without tools has no calls"


def test_budgets() -> None:
    assert play("3", "4", turns=2)[0].status is Status.MAX_TURNS
    assert play("333", budget=3)[0].status is Status.LENGTH
    none_left = play("3", budget=12)[0]
    assert (none_left.status, none_left.text) == (Status.LENGTH, "3|")


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (StepResult(), "says nothing and is not done"),
        (StepResult("x", results=("y",)), "answered 0 calls with 1 results"),
        (StepResult(reward=float("nan"), done=True), "finite"),
        ("higher", "returned a str"),
    ],
)
def test_an_answer_that_is_none_fails_the_attempt(result: Any, words: str) -> None:
    class Odd(Guess):
        async def step(self, turn):
            return result

    with pytest.raises(RolloutError, match=words):
        play("3", kind=Odd)


def test_a_world_that_hangs_fails_the_attempt_and_is_closed() -> None:
    class Hangs(Guess):
        async def step(self, turn):
            await asyncio.Event().wait()

    played, made = environment(Script("3"), Hangs, step_timeout_s=0.01)
    with pytest.raises(TimeoutError):
        asyncio.run(played.run(played.begin(PROMPT, ATTEMPT), PROMPT, 9, Sampling(1.0, 5, 100)))
    assert [world.closed for world in made] == [1]


def test_the_deadline_ends_an_attempt_whose_world_is_slow() -> None:
    class Slow(Guess):
        async def step(self, turn):
            await asyncio.Event().wait()

    played, _ = environment(Script("3"), Slow)
    sampling = Sampling(1.0, 5, 100, deadline_s=0.05)
    assert asyncio.run(played.run(played.begin(PROMPT, ATTEMPT), PROMPT, 9, sampling)).status is Status.DEADLINE


async def interrupted(kind: Callable[[], Any], then: Callable[[], Any] | None = None) -> tuple[Trajectory, Script, list[int]]:
    """An attempt that is cancelled in its second turn and goes on in another process's environment."""
    played, made = environment(Script("3", None), kind)
    attempt, sampling, noted = played.begin(PROMPT, ATTEMPT), Sampling(1.0, 5, 1000), []
    task = asyncio.create_task(played.run(attempt, PROMPT, 9, sampling, lambda each: noted.append(len(each.turns))))
    while attempt.open is None or not attempt.open.token_ids:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert [world.closed for world in made] == [1]
    engine = Script("7", "7")
    again, made = environment(engine, then or kind)
    trajectory = await again.run(attempt, PROMPT, 9, sampling, lambda each: noted.append(len(each.turns)))
    assert {world.closed for world in made} == {1}
    return trajectory, engine, noted


def test_an_interrupted_attempt_goes_on_in_a_world_that_heard_its_turns() -> None:
    trajectory, engine, noted = asyncio.run(interrupted(Guess))
    assert engine.seen == ["q3|{u:higher}"]
    assert (trajectory.text, trajectory.reward, noted) == ("3|{u:higher}7|", 1.0, [2])


def test_an_interrupted_attempt_begins_anew_where_the_world_cannot_be_had_again() -> None:
    class Once(Guess):
        replayable = False

    class Changed(Guess):
        async def step(self, turn):
            return StepResult("lower") if turn.content == "3" else await super().step(turn)

    for then in (Once, Changed):
        trajectory, engine, noted = asyncio.run(interrupted(Guess, then))
        assert engine.seen == ["q"]
        assert (trajectory.text, trajectory.reward) == ("7|", 1.0)
        assert noted == [2, 0], "what was kept of it is dropped before anything new is"


def test_what_a_world_says_first_is_part_of_the_prompt() -> None:
    class Says(Guess):
        async def reset(self, prompt):
            return "!"

    trajectory, engine, _ = play("7", kind=Says)
    assert (engine.seen, trajectory.prompt_ids) == (["q!"], [ord("q"), ord("!")])


class Tells(Guess):
    """It begins with words of its own, and knows its tools only then."""

    says = "!"

    async def reset(self, prompt: Prompt) -> str | None:
        self.tools = TOOLS
        return self.says


class TellsOther(Tells):
    says = "?"


async def stopped_and_resumed(directory: Path, then: Callable[[], Any]) -> tuple[list[str], list[Trajectory]]:
    """A group of two, stopped where one has ended and the other is in its second turn; what was sampled for it afterwards."""

    async def sampled(engine: Script, kind: Callable[[], Any], stop: bool) -> list[Trajectory]:
        journal = Journal(directory, "recipe")
        journal.published(1, "weights")
        rollouter = Rollouter(environment(engine, kind)[0], RolloutConfig(), store=journal)
        work = asyncio.create_task(rollouter.group(PROMPT, GROUP, size=2, sampling=Sampling(1.0, 5, 1000)))
        while stop and len(engine.seen) < 3:
            await asyncio.sleep(0)
        if stop:
            await rollouter.interrupt()
            work.cancel()
            await asyncio.wait([work])
        journal.close()
        return [] if stop else (await work).trajectories

    await sampled(Script("7", "3", None), Tells, stop=True)
    engine = Script("7", "7")
    made = await sampled(engine, then, stop=False)
    return engine.seen, made


def test_a_stopped_run_goes_on_where_a_world_begins_with_words_of_its_own(tmp_path: Path) -> None:
    seen, made = asyncio.run(stopped_and_resumed(tmp_path / "same", Tells))
    assert seen == ["q!T3|{u:higher}"], "the one that had ended is kept, and the other goes on"
    assert [each.text for each in made] == ["7|", "3|{u:higher}7|"]
    assert [each.prompt_ids for each in made] == [[ord(c) for c in "q!T"]] * 2
    seen, made = asyncio.run(stopped_and_resumed(tmp_path / "other", TellsOther))
    assert (seen, made[1].prompt_ids) == (["q?T"], [ord(c) for c in "q?T"]), "a world that says something else begins anew"


class Ranked(Guess):
    """The shortest attempt wins."""

    async def group_rewards(self, prompt, trajectories):
        least = min(each.response_length for each in trajectories)
        return [float(each.response_length == least) for each in trajectories]


def test_a_group_is_judged_when_all_of_it_is_done() -> None:
    played, made = environment(Script("7", "<think>so</think>7"), Ranked)
    group = asyncio.run(Rollouter(played, RolloutConfig()).group(PROMPT, GROUP, size=2, sampling=Sampling(1.0, 5, 100)))
    assert [each.reward for each in group.trajectories] == [1.0, 0.0]
    assert [world.closed for world in made] == [1, 1, 1]


def test_a_group_that_cannot_be_judged_failed() -> None:
    class Wrong(Guess):
        async def group_rewards(self, prompt, trajectories):
            return [1.0]

    played, _ = environment(Script("7", "7"), Wrong)
    rollouter = Rollouter(played, RolloutConfig(retries=0))
    sampling = Sampling(1.0, 5, 100)
    group = asyncio.run(rollouter.group(PROMPT, GROUP, size=2, sampling=sampling, keep_failed=True))
    assert group.trajectories == []
    assert "needed: 2 finite numbers" in group.failed[0].reason


def test_a_world_by_its_name() -> None:
    here = f"{__name__}:Guess"
    assert load_worlds(here, {"secret": 3})().secret == 3
    for path, options, words in (
        (here, {"secrte": 3}, "secret"),
        (f"{__name__}:END", {}, "is a int"),
        (f"{__name__}:Letters", {}, "lacks tools, replayable, reset, step, close"),
        (f"{__name__}:Nobody", {}, "PYTHONPATH"),
        ("no.such.module:Nobody", {}, "PYTHONPATH"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_worlds(path, options)


def test_a_configuration_names_an_environment() -> None:
    world = RolloutConfig.model_validate({"environment": {"type": "world", "path": "a.b:C", "options": {"n": 1}}})
    assert world.code_tool is None
    assert RolloutConfig().code_tool is not None
    assert json.loads(world.model_dump_json())["environment"]["options"] == {"n": 1}
