"""Trajectories: turns, budgets, statuses and rewards, with an engine that answers from a script."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.data.samples import build_samples
from ctpo_megatron.errors import AsideLost, ConfigError, EngineError, EngineRefused, NoServerLeft, RolloutError, StorageError
from ctpo_megatron.record.heartbeat import Depths
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.calculator import Calculator
from ctpo_megatron.rollout.counted import CountedTool
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.grading.boxes import last_box
from ctpo_megatron.rollout.protocols import Outcome, PastCall, Sampling, Score, ToolResult, ToolRunner
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.types import Generation, GroupId, Prompt, Status, Trajectory
from tests.support.trajectories import ATTEMPT, GROUP

END = ord("|")
PROMPT = Prompt(4, ({"role": "user", "content": "question"},), "56")
SAMPLING = Sampling(1.0, 5, 9)
CALL = "```python\nprint(7*8)\n```"
WRONG = "```python\nprint(7/0)\n```"


class Letters:
    """A letter is its code; | ends a turn; a tool says {...}."""

    stop_token_ids = [END]  # noqa: RUF012

    def prompt_ids(self, messages):
        return [ord(c) for c in messages[-1]["content"]]

    def tool_ids(self, text, *, earlier=(), end=None):
        assert end == END
        self.earlier = list(earlier)
        return [ord(c) for c in f"{{{text}}}"]

    def decode(self, ids, *, special=False):
        return "".join(chr(i) for i in ids if special or i != END)


@dataclass
class Script:
    """An engine that says its lines in turn, each cut to the tokens allowed; its version grows with every call."""

    lines: list[str]
    seen: list[tuple[str, int, int]] = field(default_factory=list)  # input, tokens allowed, session

    async def generate(
        self, input_ids, done, *, max_new_tokens, temperature, truncation, stop_token_ids, session, recorded, deadline
    ):
        assert stop_token_ids == [END]
        assert recorded is None
        assert deadline is None
        assert done == Generation()
        self.seen.append(("".join(map(chr, input_ids)), max_new_tokens, session))
        ids = [ord(c) for c in self.lines[len(self.seen) - 1]] + [END]
        finish = "stop" if len(ids) <= max_new_tokens else "length"
        ids = ids[:max_new_tokens]
        return Generation(ids, [-0.5] * len(ids), [len(self.seen)] * len(ids), finish)


class Boxes:
    """The real rule for the box, with plain equality."""

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        return Score(float(last_box(outcome.text) == prompt.answer))


CALCULATOR = Calculator()


def play(*lines: str, budget: int = 1000, turns: int = 5, tool: ToolRunner | None = CALCULATOR) -> tuple[Trajectory, Script]:
    script = Script(list(lines))
    environment = ToolEnvironment(script, Letters(), tool, Boxes())
    return asyncio.run(environment.run(environment.begin(PROMPT, ATTEMPT), PROMPT, 9, Sampling(1.0, turns, budget))), script


def test_a_reward_sees_how_an_attempt_went_and_what_it_says_is_kept():
    class Seeing:
        async def score(self, prompt, outcome):
            self.seen = outcome
            return Score(0.5, True, "given", "why", {"style": 0.25}, 0.75)

    reward = Seeing()
    environment = ToolEnvironment(Script([CALL, r"\boxed{56}"]), Letters(), CALCULATOR, reward)
    trajectory = asyncio.run(environment.run(environment.begin(PROMPT, ATTEMPT), PROMPT, 9, Sampling(1.0, 5, 1000)))
    said = ("assistant", CALL), ("tool", "56"), ("assistant", r"\boxed{56}")
    assert reward.seen == Outcome(f"{CALL}\n\\boxed{{56}}", said, trajectory.response_length, 1, 0, Status.FINISHED)
    assert (trajectory.reward, trajectory.undecided, trajectory.given, trajectory.why) == (0.5, True, "given", "why")
    assert (trajectory.terms, trajectory.accuracy, trajectory.rightness) == ({"style": 0.25}, 0.75, 0.75)


def test_a_tool_call_and_an_answer():
    trajectory, script = play(CALL, r"\boxed{56}")
    assert trajectory.status is Status.FINISHED
    assert trajectory.reward == 1.0
    assert (trajectory.tool_calls, trajectory.tool_errors) == (1, 0)
    assert [t.role for t in trajectory.turns] == ["assistant", "tool", "assistant"]
    assert trajectory.text == f"{CALL}|{{56}}\\boxed{{56}}|"
    assert script.seen[1] == (f"question{CALL}|{{56}}", 1000 - len(f"{CALL}|{{56}}"), 9)
    assert trajectory.turns[0].versions[0] == 1
    assert trajectory.turns[2].versions[0] == 2
    assert set(trajectory.turns[1].rollout_logp) == {0.0}
    assert set(trajectory.turns[1].versions) == {-1}
    (sample,) = build_samples(asyncio.run(group_of(trajectory)), [1.0], 0)
    assert "".join(map(chr, [sample.input_ids[0], *sample.labels])) == "question" + trajectory.text
    assert "".join(chr(i) for i, w in zip(sample.labels, sample.mask, strict=True) if w) == f"{CALL}|\\boxed{{56}}|"


async def group_of(trajectory: Trajectory):
    class Same:
        def begin(self, prompt, attempt):
            return Attempt(attempt, prompt.index, [])

        async def run(self, attempt, prompt, session, sampling, note):
            return trajectory

    return await Rollouter(Same(), RolloutConfig()).group(PROMPT, GROUP, size=1, sampling=SAMPLING)


def test_an_error_of_the_program_is_told_and_counted():
    trajectory, _ = play(WRONG, r"\boxed{56}")
    assert (trajectory.tool_calls, trajectory.tool_errors, trajectory.reward) == (1, 1, 1.0)
    assert "ZeroDivisionError: division by zero" in trajectory.text


def test_what_a_program_prints_is_no_answer():
    """Only what the model wrote itself is judged."""

    class Boxing:
        async def run(self, code):
            return ToolResult("\\boxed{56}", True, 0.0)

    trajectory, _ = play(CALL, "done", tool=Boxing())
    assert "{\\boxed{56}}" in trajectory.text
    assert trajectory.reward == 0.0


@pytest.mark.parametrize(
    ("lines", "options", "status", "roles"),
    [
        (["no idea"], {}, Status.FINISHED, "a"),
        ([CALL, CALL, CALL], {"turns": 3}, Status.MAX_TURNS, "atata"),
        ([CALL], {"turns": 1}, Status.MAX_TURNS, "a"),
        ([CALL], {"tool": None}, Status.FINISHED, "a"),
        ([CALL], {"budget": len(CALL)}, Status.LENGTH, "a"),
        ([CALL], {"budget": len(CALL) + 1}, Status.LENGTH, "a"),
        ([CALL], {"budget": len(CALL) + 1 + len("{56}")}, Status.LENGTH, "a"),  # the tool's turn fits, an answer does not
        ([CALL, "ab"], {"budget": len(CALL) + 1 + len("{56}") + 1}, Status.LENGTH, "ata"),
        ([CALL, "ab"], {"budget": len(CALL) + 1 + len("{56}") + 3}, Status.FINISHED, "ata"),
        ([CALL + r"\boxed{56}"], {}, Status.FINISHED, "a"),
    ],
)
def test_how_it_ends(lines, options, status, roles):
    trajectory, script = play(*lines, **options)
    assert trajectory.status is status
    assert "".join(t.role[0] for t in trajectory.turns) == roles
    assert len(script.seen) == len(lines)


@settings(max_examples=80, deadline=None)
@given(
    lines=st.lists(st.sampled_from([CALL, WRONG, r"\boxed{56}", "hm", ""]), min_size=6, max_size=6),
    budget=st.integers(1, 150),
    turns=st.integers(1, 5),
)
def test_budgets_hold(lines, budget, turns):
    trajectory, script = play(*lines, budget=budget, turns=turns)
    assert 1 <= trajectory.response_length <= budget
    assert 1 <= len(script.seen) <= turns
    assert trajectory.turns[-1].role == "assistant"
    assert trajectory.sampled_length == sum(len(t.token_ids) for t in trajectory.turns if t.role == "assistant")
    for before, after in pairwise(trajectory.turns):
        assert before.role != after.role
        assert before.role == "tool" or before.token_ids[-1] == END


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Generation([], [], [], "stop"), "0 tokens; it was asked for 1 to 10"),
        (Generation([1] * 11, [0.0] * 11, [1] * 11, "length"), "11 tokens"),
        (Generation([65], [0.0], [1], "abort"), "'abort'; known: stop, length"),
        (Generation([65], [0.0], [1], "stop"), r"after token 65; stop tokens are \[124\]"),
    ],
)
def test_an_engine_that_breaks_its_promise_is_an_error(answer, words):
    class Engine:
        async def generate(self, input_ids, done, **_):
            return answer

    environment = ToolEnvironment(Engine(), Letters(), None, Boxes())
    with pytest.raises(RolloutError, match=words):
        asyncio.run(environment.run(environment.begin(PROMPT, ATTEMPT), PROMPT, 0, Sampling(1.0, 1, 10)))


class Counting:
    """An environment that notes how many run at a time and may fail."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.running = self.most = self.ended = 0
        self.sessions: list[int] = []
        self.sampling: Sampling | None = None
        self.fails_at = fails_at

    def begin(self, prompt, attempt):
        return Attempt(attempt, prompt.index, [1])

    async def run(self, attempt, prompt, session, sampling, note):
        self.sessions.append(session)
        self.sampling = sampling
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.01 if self.fails_at is None else 30 * (session != self.fails_at))
            if session == self.fails_at:
                raise RolloutError("the server is gone")
        finally:
            self.running -= 1
            self.ended += 1
        return Trajectory(prompt.index, [1], [], Status.FINISHED, id=attempt.id)


def test_groups_share_the_bound_and_each_attempt_has_its_session():
    environment = Counting()
    rollouter = Rollouter(environment, RolloutConfig(concurrency=3))
    sampling = Sampling(0.7, 2, 7)

    async def two():
        return await asyncio.gather(*(rollouter.group(PROMPT, GroupId(n), size=5, sampling=sampling) for n in (7, 8)))

    groups = asyncio.run(two())
    assert [len(g.trajectories) for g in groups] == [5, 5]
    assert groups[0].prompt is PROMPT
    assert environment.most == 3
    assert sorted(environment.sessions) == list(range(35, 45))  # as even over any number of servers as counting is
    assert [str(t.id) for t in groups[1].trajectories] == [f"g00000008.{n}" for n in range(5)]
    assert [group.id for group in groups] == [GroupId(7), GroupId(8)]
    assert environment.sampling == sampling


def test_attempts_beside_training_take_no_place_of_its_own():
    training, aside = Counting(), Counting()
    rollouter = Rollouter(training, RolloutConfig(concurrency=3), aside=(aside, 2))

    async def both():
        groups = ((GroupId(0), False), (GroupId(0, evaluation=4), True))
        return await asyncio.gather(
            *(rollouter.group(PROMPT, name, size=5, sampling=Sampling(0.7, 2, 7), aside=way) for name, way in groups)
        )

    asyncio.run(both())
    assert (training.most, aside.most) == (3, 2)
    assert (training.ended, aside.ended) == (5, 5)


def test_a_failure_ends_the_group_and_comes_out_as_itself():
    environment = Counting(fails_at=2)
    rollouter = Rollouter(environment, RolloutConfig())
    with pytest.raises(RolloutError, match="the server is gone"):
        asyncio.run(asyncio.wait_for(rollouter.group(PROMPT, GROUP, size=4, sampling=SAMPLING), 10))
    assert environment.running == 0


class Failing(Counting):
    """An environment in which attempts fail so many times, by their numbers, and go on from where they were."""

    def __init__(self, times: dict[int, int], error: Exception) -> None:
        super().__init__()
        self.times, self.error = dict(times), error
        self.found: list[tuple[int, int | None]] = []

    async def run(self, attempt, prompt, session, sampling, note):
        self.found.append((attempt.id.number, None if attempt.open is None else len(attempt.open.token_ids)))
        await asyncio.sleep(0)
        if self.times.get(attempt.id.number, 0):
            self.times[attempt.id.number] -= 1
            attempt.open = Generation([1] * 3, [0.0] * 3, [1] * 3)
            raise self.error
        if attempt.id.number == 3:
            await asyncio.sleep(30)
        return Trajectory(prompt.index, [1], [], Status.FINISHED, id=attempt.id)


def test_an_attempt_that_fails_is_tried_again_from_where_it_was(monkeypatch):
    monkeypatch.setattr("ctpo_megatron.rollout.rollouter.RETRY_PAUSE_S", 0.001)
    environment = Failing({1: 2}, EngineError("no answer"))
    made = asyncio.run(Rollouter(environment, RolloutConfig(retries=2)).group(PROMPT, GROUP, size=3, sampling=SAMPLING))
    assert (len(made.trajectories), made.failed) == (3, [])
    assert [open_tokens for number, open_tokens in environment.found if number == 1] == [None, 3, 3]
    environment = Failing({1: 2}, RolloutError("it answered with too many tokens"))
    asyncio.run(Rollouter(environment, RolloutConfig(retries=2)).group(PROMPT, GROUP, size=3, sampling=SAMPLING))
    assert [open_tokens for number, open_tokens in environment.found if number == 1] == [
        None,
        None,
        None,
    ]  # not from what is wrong


def test_an_attempt_that_fails_too_often_is_data_for_training_and_an_error_elsewhere(monkeypatch):
    monkeypatch.setattr("ctpo_megatron.rollout.rollouter.RETRY_PAUSE_S", 0.001)
    failing = {1: 3}, EngineError("no answer")
    rollouter = Rollouter(Failing(*failing), RolloutConfig(retries=2))
    made = asyncio.run(asyncio.wait_for(rollouter.group(PROMPT, GROUP, size=4, sampling=SAMPLING, keep_failed=True), 5))
    assert made.trajectories == []
    other = "another attempt of its group failed"
    assert [(f.id.number, f.reason, f.aborted, f.response_length, f.reward) for f in made.failed] == [
        (0, other, True, 0, 0.0),
        (1, "EngineError: no answer", False, 3, None),
        (2, other, True, 0, 0.0),
        (3, other, True, 0, None),
    ]
    rollouter = Rollouter(Failing(*failing), RolloutConfig(retries=2))
    with pytest.raises(EngineError, match="no answer"):
        asyncio.run(asyncio.wait_for(rollouter.group(PROMPT, GROUP, size=4, sampling=SAMPLING), 5))


@pytest.mark.parametrize(
    "error", [NoServerLeft("none"), AsideLost("they died"), EngineRefused("too long"), StorageError("full"), ConfigError("wrong")]
)
def test_what_is_the_runs_fault_ends_it_at_once(error):
    rollouter = Rollouter(Failing({1: 1}, error), RolloutConfig(retries=2))
    with pytest.raises(type(error)) as raised:
        asyncio.run(asyncio.wait_for(rollouter.group(PROMPT, GROUP, size=4, sampling=SAMPLING, keep_failed=True), 5))
    assert raised.value is error


@pytest.mark.parametrize("interrupted_at", range(1, 8))
def test_an_attempt_that_is_interrupted_anywhere_ends_as_if_it_had_not_been(interrupted_at: int) -> None:
    """In the middle of a turn, while the tool runs, and while the answer is judged: each is a step of this attempt."""
    steps = iter(range(1, 100))

    class Stop(Exception):
        pass

    def step() -> None:
        if next(steps) == interrupted_at:
            raise Stop

    @dataclass
    class Halves(Script):
        """Says each line in two parts, the second at a newer version."""

        async def generate(self, input_ids, done, **options):
            said = "".join(map(chr, input_ids)).count("|")
            ids = [ord(c) for c in self.lines[said]] + [END]
            for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
                if len(done.token_ids) < len(ids) and done.token_ids + part == ids[: len(done.token_ids) + len(part)]:
                    step()
                    done.append(Generation(part, [-0.5] * len(part), [1] * len(part)))
            done.finish = "stop"
            return done

    class Careful:
        async def run(self, code):
            step()
            return await CALCULATOR.run(code)

    class Judge(Boxes):
        async def score(self, prompt, outcome):
            step()
            return await super().score(prompt, outcome)

    environment = ToolEnvironment(Halves([CALL, r"\boxed{56}"]), Letters(), Careful(), Judge())
    attempt, noted = environment.begin(PROMPT, ATTEMPT), []

    def play_on() -> Trajectory:
        return asyncio.run(environment.run(attempt, PROMPT, 9, Sampling(1.0, 5, 1000), noted.append))

    if interrupted_at <= 6:
        with pytest.raises(Stop):
            play_on()
    trajectory = play_on()
    whole, _ = play(CALL, r"\boxed{56}")
    assert (trajectory.text, trajectory.reward, trajectory.status) == (whole.text, 1.0, Status.FINISHED)
    assert [turn.token_ids for turn in trajectory.turns] == [turn.token_ids for turn in whole.turns]
    assert (trajectory.tool_calls, len(noted)) == (1, 1)


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
