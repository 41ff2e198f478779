"""Feeding and collecting with the real rollouter and journal, over an environment whose attempts take any time."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.errors import NoServerLeft, RolloutError
from ctpo_megatron.loop.admission import Admission, Position
from ctpo_megatron.loop.buffer import GroupBuffer
from ctpo_megatron.loop.composition import StepRules
from ctpo_megatron.loop.ledger import Ledger, read_tally
from ctpo_megatron.loop.pipeline import Pipeline
from ctpo_megatron.loop.protocols import Teachers
from ctpo_megatron.loop.train import first_failure
from ctpo_megatron.record.events import Event
from ctpo_megatron.record.rollout_events import GroupFailed
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.types import AttemptId, FailedAttempt, Generation, Prompt, Status, Trajectory, TrajectoryGroup

PROMPTS = [Prompt(i, ({"role": "user", "content": str(i)},), "1") for i in range(13)]
SIZE = 3
STEPS = 6
RULES = StepRules(2, 2, oversample=2, max_refills=2)
CONFIG = RolloutConfig(group_size=SIZE, retries=1, failed_share=0.5, failed_window=20)


@dataclass
class Timely:
    """An environment whose attempts take times by `order`, over several weights; what they earn goes by their group."""

    order: int
    errors: Callable[[AttemptId], Exception | None] = lambda _attempt: None
    version: int = 0
    begun: set[str] = field(default_factory=set)

    def begin(self, prompt: Prompt, attempt: AttemptId) -> Attempt:
        return Attempt(attempt, prompt.index, [prompt.index])

    async def run(self, attempt, prompt, session, sampling, note):
        if (error := self.errors(attempt.id)) is not None:
            raise error
        self.begun.add(str(attempt.id))
        attempt.open = attempt.open or Generation()
        while len(attempt.open.token_ids) < 1 + (attempt.id.group.number + attempt.id.number) % 4:
            attempt.open.append(Generation([7], [-0.5], [self.version]))
            await asyncio.sleep(random.Random(f"{self.order} {attempt.id} {len(attempt.open.token_ids)}").uniform(0, 0.004))
        attempt.close_turn(attempt.open)
        reward = 0.0 if attempt.id.group.number % 5 == 3 else float(attempt.id.number == 0)
        return Trajectory(prompt.index, attempt.prompt_ids, attempt.turns, Status.FINISHED, reward=reward, id=attempt.id)


def failing(attempt: AttemptId) -> Exception | None:
    return RolloutError("the sandbox is gone") if attempt.group.number in (2, 9) and attempt.number == 1 else None


@dataclass
class Played:
    """What a run did."""

    steps: list[list[int]] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)  # the oldest of each group of a step
    positions: list[Position] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    told: list[list[list[float] | None]] = field(default_factory=list)  # what teachers said of the turns of a step


class Strict:
    """Says -2 of every token, and fails for the second attempt of some groups."""

    def __init__(self, fails: set[int]) -> None:
        self.fails, self.seen = fails, 0

    async def teach(self, group: TrajectoryGroup) -> TrajectoryGroup:
        await asyncio.sleep(0.001)
        self.seen += 1
        if group.id.number in self.fails:
            reasons = ["another attempt of its group failed", "teacher 'big' did not answer"]
            failed = [FailedAttempt(each.id, reasons[each.id.number == 1], each.id.number != 1) for each in group.trajectories]
            return replace(group, trajectories=[], failed=failed)
        taught = [
            replace(each, turns=[replace(turn, teacher_logp=[-2.0] * len(turn.token_ids)) for turn in each.turns])
            for each in group.trajectories
        ]
        return replace(group, trajectories=taught)

    def metrics(self) -> dict[str, float]:
        seen, self.seen = self.seen, 0
        return {"teacher/retries": float(seen)}


async def play(
    run_dir: Path,
    environment: Timely,
    *,
    until: int = STEPS,
    step: int = 0,
    position: Position | None = None,
    teachers: Teachers | None = None,
    **settings: float,
) -> Played:
    """Make the steps from `step` on; a run that ends before STEPS is killed while its rollouts go on."""
    run_dir.mkdir(exist_ok=True)
    config, played, journal = CONFIG.model_copy(update=settings), Played(), Journal(run_dir / "journal", "r", step=step)
    ledger = Ledger(run_dir / "ledger.jsonl", step=step, position=position)
    sampler = PromptSampler(PROMPTS, 1) if position is None else PromptSampler.restore(PROMPTS, position.cursor)
    admission = Admission(sampler) if position is None else Admission(sampler, position.groups, position.open)
    buffer = GroupBuffer(RULES, first_step=step, last_step=STEPS, admitted=admission.groups, decisions=journal)
    rollouter = Rollouter(environment, config, journal)
    pipeline = Pipeline(admission, buffer, ledger, rollouter, config, played.events.append, teachers)
    environment.version = step
    journal.published(step, f"weights {step}")

    async def train() -> None:
        for each in range(step, until):
            taken = await pipeline.take(each)
            played.steps.append([group.id.number for group in taken.groups])
            turns = [[turn for t in group.trajectories for turn in t.turns] for group in taken.groups]
            played.told.append([turn.teacher_logp for of_group in turns for turn in of_group])
            played.versions.append([min(version for turn in of_group for version in turn.versions) for of_group in turns])
            played.positions.append(taken.position)
            played.metrics.append(taken.metrics)
            assert ledger.unbalanced() == []
            await asyncio.sleep(0.003)  # training
            environment.version = each + 1
            journal.published(each + 1, f"weights {each + 1}")
            buffer.published(each + 1)

    feeding, training = asyncio.ensure_future(pipeline.feed()), asyncio.ensure_future(train())
    try:
        if until == STEPS:
            await asyncio.wait_for(first_failure(feeding, training), 20)
        else:
            await asyncio.wait_for(training, 20)
    finally:
        for task in (feeding, training):
            task.cancel()
        await asyncio.gather(feeding, training, return_exceptions=True)
        journal.close()
        ledger.close()
    return played


def test_a_run_that_is_killed_and_one_that_is_given_its_journal_make_the_same_steps(tmp_path: Path) -> None:
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    killed.mkdir()
    straight.mkdir()
    first = asyncio.run(play(killed, Timely(1, failing), until=4))
    second = asyncio.run(
        play(killed, Timely(2, failing), step=2, position=first.positions[1])
    )  # the newest checkpoint is of step 2
    assert second.steps[:2] == first.steps[2:]
    shutil.copytree(killed / "journal", straight / "journal")
    environment = Timely(3, failing)
    third = asyncio.run(play(straight, environment))
    assert third.steps == first.steps[:2] + second.steps
    assert environment.begun == set(), "it sampled again what was in the journal"
    assert third.metrics == first.metrics[:2] + second.metrics
    assert [event.reason for event in third.events if isinstance(event, GroupFailed)] == []
    for oldest, step in zip(third.versions, range(STEPS), strict=True):
        assert min(oldest) >= step - RULES.staleness
    assert sum(each["ledger/filtered"] for each in third.metrics) >= 1
    assert sum(each["ledger/failed"] for each in third.metrics) >= 1
    tallies = [read_tally(run_dir / "ledger.jsonl")[0].summary() for run_dir in (killed, straight)]
    assert tallies[0]["groups"] == tallies[1]["groups"]
    assert tallies[0]["groups"]["trained"] == STEPS * RULES.groups


def test_stragglers_go_on_with_the_weights_of_the_next_steps(tmp_path: Path) -> None:
    played = asyncio.run(play(tmp_path, Timely(5)))
    assert sum(each["ledger/carried"] for each in played.metrics) >= 1
    trained = [number for step in played.steps for number in step]
    assert len(trained) == len(set(trained)) == STEPS * RULES.groups


def test_every_turn_that_is_trained_on_is_taught_and_a_teacher_that_fails_fails_the_group(tmp_path: Path) -> None:
    """A run that is killed asks again, about what was sampled and not trained on."""
    first = asyncio.run(play(tmp_path, Timely(1), until=3, teachers=Strict({2, 5})))
    assert {turn is not None and set(turn) == {-2.0} for step in first.told for turn in step} == {True}
    failures = [event for event in first.events if isinstance(event, GroupFailed)]
    assert {(event.group, event.reason) for event in failures} == {
        (f"g{number:08d}", "teacher 'big' did not answer") for number in (2, 5)
    }
    assert sum(each["teacher/retries"] for each in first.metrics) >= 3 * RULES.groups
    assert sum(each["ledger/failed"] for each in first.metrics) == 2
    environment, again = Timely(2), Strict(set())
    second = asyncio.run(play(tmp_path, environment, step=2, position=first.positions[1], teachers=again))
    assert second.steps[0] == first.steps[2]
    assert {turn is not None and set(turn) == {-2.0} for step in second.told for turn in step} == {True}


def test_teachers_that_fail_too_often_end_the_run_with_their_reason(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"rollout.failed_share = 0.5 of 20.*: teacher 'big' did not answer"):
        asyncio.run(play(tmp_path, Timely(1), teachers=Strict(set(range(100)))))


def test_failures_beyond_the_share_end_the_run_and_name_the_reason(tmp_path: Path) -> None:
    def all_fail(attempt: AttemptId) -> Exception | None:
        return RolloutError("the sandbox is gone") if attempt.number == 2 else None

    with pytest.raises(RolloutError, match=r"rollout.failed_share = 0.5 of 20.* times: RolloutError: the sandbox is gone"):
        asyncio.run(play(tmp_path, Timely(1, all_fail)))


class Unsure(Timely):
    """Every third attempt is undecided."""

    async def run(self, attempt, prompt, session, sampling, note):
        made = await super().run(attempt, prompt, session, sampling, note)
        made.undecided, made.why = attempt.id.number == 2, "it raised ValueError"
        return made


def test_undecided_attempts_are_trained_on_until_their_share_ends_the_run(tmp_path: Path) -> None:
    played = asyncio.run(play(tmp_path / "few", Unsure(1), undecided_share=0.4))
    assert len(played.steps) == STEPS
    with pytest.raises(RolloutError, match=r"rollout.undecided_share = 0.2 of 20.* times: it raised ValueError"):
        asyncio.run(play(tmp_path / "many", Unsure(1), undecided_share=0.2))


def test_the_end_of_all_servers_ends_the_run_at_once(tmp_path: Path) -> None:
    def gone(attempt: AttemptId) -> Exception | None:
        return NoServerLeft("no inference server is left") if attempt.group.number == 4 else None

    environment = Timely(1, gone)
    with pytest.raises(NoServerLeft):
        asyncio.run(play(tmp_path, environment))
