"""What takes its time: tools at a deadline, sessions of tools, prompts that are rendered once."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.errors import EngineError
from ctpo_megatron.record.heartbeat import Depths
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.counted import CountedTool
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.protocols import PastCall, Sampling, ToolResult
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.types import Prompt, Status
from tests.support.scripted import CALL, PROMPT, WRONG, Boxes, Letters, Script, play
from tests.support.trajectories import ATTEMPT, GROUP


class Timed(Script):
    """A script whose engine is told a deadline."""

    async def generate(self, input_ids, done, *, deadline, **options):
        self.deadline = deadline
        return await super().generate(input_ids, done, deadline=None, **options)


class Tool:
    """Takes its time, and may fail in doing so."""

    def __init__(self, seconds: float, *errors: Exception) -> None:
        self.seconds, self.errors, self.calls, self.ended = seconds, list(errors), 0, 0

    async def run(self, code: str) -> ToolResult:
        self.calls += 1
        try:
            await asyncio.sleep(self.seconds)
            if self.errors:
                raise self.errors.pop(0)
        finally:
            self.ended += 1
        return ToolResult("7", True, self.seconds)


def test_a_tool_that_runs_at_the_deadline_is_not_waited_for() -> None:
    """It is ended, its call adds nothing, and what was said so far is judged."""
    tool = Tool(3600.0)
    environment = ToolEnvironment(Timed(["\\boxed{56}\n" + CALL]), Letters(), tool, Boxes())
    attempt = environment.begin(PROMPT, ATTEMPT)
    made = asyncio.run(asyncio.wait_for(environment.run(attempt, PROMPT, 9, Sampling(1.0, 5, 1000, deadline_s=0.2)), 20))
    assert (made.status, made.reward, made.tool_calls, len(made.turns)) == (Status.DEADLINE, 1.0, 0, 1)
    assert (tool.calls, tool.ended) == (1, 1)
    assert made.seconds >= 0.2


def test_the_time_that_an_attempt_took_is_kept_whenever_it_is() -> None:
    """After a tool's turn and where it is interrupted: a process that goes on from there keeps to the same deadline."""
    kept: list[Attempt] = []

    async def interrupted() -> None:
        environment = ToolEnvironment(Timed([CALL, CALL]), Letters(), Tool(0.2), Boxes())
        attempt = environment.begin(PROMPT, ATTEMPT)
        sampling = Sampling(1.0, 5, 1000, deadline_s=60.0)
        running = asyncio.ensure_future(environment.run(attempt, PROMPT, 9, sampling, lambda now: kept.append(now.copy())))
        while not kept:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        kept.append(attempt.copy())
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        kept.append(attempt.copy())

    asyncio.run(interrupted())
    assert 0.2 <= kept[0].seconds <= kept[1].seconds - 0.1
    assert kept[1].seconds <= kept[2].seconds < 30
    assert {each.working_since for each in kept} == {None}

    engine, tool = Timed([CALL, CALL]), Tool(3600.0)
    again = ToolEnvironment(engine, Letters(), tool, Boxes())
    sampling = Sampling(1.0, 5, 1000, deadline_s=kept[1].seconds + 0.2)
    made = asyncio.run(asyncio.wait_for(again.run(kept[1], PROMPT, 9, sampling), 20))
    assert (made.status, tool.ended) == (Status.DEADLINE, 1)
    assert sampling.deadline_s is not None
    assert sampling.deadline_s <= made.seconds < 20


@pytest.mark.parametrize("deadline_s", [None, 60.0])
def test_a_tool_that_fails_in_time_is_no_deadline(deadline_s: float | None) -> None:
    """Its TimeoutError is a failure of its own, which is tried again."""
    tool = Tool(0.0, TimeoutError("the tool's host"))
    engine = (Script if deadline_s is None else Timed)([CALL, "\\boxed{56}"])
    rollouter = Rollouter(ToolEnvironment(engine, Letters(), tool, Boxes()), RolloutConfig(retries=1))
    (made,) = asyncio.run(
        rollouter.group(PROMPT, GROUP, size=1, sampling=Sampling(1.0, 5, 1000, deadline_s=deadline_s))
    ).trajectories
    assert (made.status, made.reward, made.tool_calls, tool.calls) == (Status.FINISHED, 1.0, 1, 2)


def test_a_prompt_is_rendered_once_for_all_attempts_of_a_group() -> None:
    class Counting(Letters):
        rendered = 0

        def prompt_ids(self, messages):
            self.rendered += 1
            return super().prompt_ids(messages)

    chat = Counting()
    environment = ToolEnvironment(Script([]), chat, None, Boxes())
    again = Prompt(5, ({"role": "user", "content": "another"},), "56")
    begun = [environment.begin(prompt, ATTEMPT) for prompt in (PROMPT, PROMPT, again, again, PROMPT)]
    assert ["".join(map(chr, each.prompt_ids)) for each in begun] == ["question"] * 2 + ["another"] * 2 + ["question"]
    assert chat.rendered == 3


class Sessions:
    """A tool that gives each attempt a session of its own and notes what becomes of it."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.open = list(errors), 0
        self.begun: list[list[PastCall]] = []

    async def run(self, code: str) -> ToolResult:
        raise AssertionError("an attempt has a session")

    @asynccontextmanager
    async def session(self, past):
        self.begun.append(list(past))
        self.open += 1
        try:
            yield Tool(0.0, *self.errors[:1])
        finally:
            self.open -= 1
            self.errors = self.errors[1:]


@pytest.mark.parametrize("counted", [False, True])
def test_a_tool_with_sessions_is_opened_with_the_attempt_and_closed_with_it(counted: bool) -> None:
    tool, depths = Sessions(), Depths()
    trajectory, _ = play(CALL, WRONG, r"\boxed{56}", tool=CountedTool(tool, depths) if counted else tool)
    assert (trajectory.tool_calls, trajectory.status) == (2, Status.FINISHED)
    assert (tool.begun, tool.open) == ([[]], 0)


def test_an_attempt_that_is_tried_again_gives_its_new_session_the_programs_of_the_old_one() -> None:
    class Fails(Script):
        """It has no answer to the second tool's turn at first."""

        async def generate(self, input_ids, done, **options):
            if "".join(map(chr, input_ids)).count("{") == 2 and not self.failed:
                self.failed = True
                raise EngineError("no answer")
            return await super().generate(input_ids, done, **options)

    engine, tool = Fails([CALL, WRONG, r"\boxed{56}"]), Sessions()
    engine.failed = False
    rollouter = Rollouter(ToolEnvironment(engine, Letters(), tool, Boxes()), RolloutConfig(retries=1))
    (made,) = asyncio.run(rollouter.group(PROMPT, GROUP, size=1, sampling=Sampling(1.0, 5, 1000))).trajectories
    assert made.reward == 1.0
    assert tool.begun == [[], [PastCall("print(7*8)\n", "7"), PastCall("print(7/0)\n", "7")]]
    assert tool.open == 0


def test_a_session_ends_when_its_attempt_is_cancelled_or_fails() -> None:
    tool = Sessions(ValueError("the tool's host"), ValueError("the tool's host"))
    environment = ToolEnvironment(Script([CALL]), Letters(), tool, Boxes())
    with pytest.raises(ValueError, match="the tool's host"):
        asyncio.run(environment.run(environment.begin(PROMPT, ATTEMPT), PROMPT, 9, Sampling(1.0, 5, 1000)))
    assert (len(tool.begun), tool.open) == (1, 0)

    class Slow(Script):
        async def generate(self, input_ids, done, **options):
            self.asked.set()
            return await asyncio.sleep(3600)

    async def cancelled() -> None:
        engine = Slow([CALL])
        engine.asked = asyncio.Event()
        environment = ToolEnvironment(engine, Letters(), tool, Boxes())
        running = asyncio.ensure_future(environment.run(environment.begin(PROMPT, ATTEMPT), PROMPT, 9, Sampling(1.0, 5, 1000)))
        await engine.asked.wait()
        assert tool.open == 1
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(cancelled())
    assert tool.open == 0
