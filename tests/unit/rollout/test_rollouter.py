"""Attempts together: the bound that groups share, and what becomes of those that fail or are interrupted."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.errors import AsideLost, ConfigError, EngineError, EngineRefused, NoServerLeft, RolloutError, StorageError
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.types import Generation, GroupId, Status, Trajectory
from tests.support.scripted import CALCULATOR, CALL, END, PROMPT, SAMPLING, Boxes, Letters, Script, play
from tests.support.trajectories import ATTEMPT, GROUP


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
