"""Which groups may start when, and what a step takes: staleness, groups that go on, groups that are replaced."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.loop.buffer import GroupBuffer, Undecided
from ctpo_megatron.loop.composition import StepRules
from ctpo_megatron.record.segments import Place
from ctpo_megatron.rollout.plans import Plans
from ctpo_megatron.types import (
    AttemptId,
    Composition,
    End,
    FailedAttempt,
    Fate,
    GroupId,
    Prompt,
    Status,
    Trajectory,
    TrajectoryGroup,
    Turn,
)


def prompt(index: int) -> Prompt:
    return Prompt(index, ({"role": "user", "content": "x"},), "1")


def group(number: int, index: int | None = None, version: int = 0, rewards: tuple[float, ...] = (0.0, 1.0)) -> TrajectoryGroup:
    turns = [Turn("assistant", [1], [-1.0], [version])]
    name = GroupId(number)
    made = [Trajectory(0, [3], turns, Status.FINISHED, reward=r, id=AttemptId(name, n)) for n, r in enumerate(rewards)]
    return TrajectoryGroup(prompt(number if index is None else index), made, id=name)


class Fed:
    """A buffer, and the number of the next group."""

    def __init__(self, rules: StepRules, first_step: int = 0, last_step: int = 3, admitted: int = 0, **options: Any) -> None:
        self.next = admitted or first_step * rules.groups
        self.buffer = GroupBuffer(rules, first_step=first_step, last_step=last_step, admitted=self.next, **options)

    async def admitted_now(self) -> list[int]:
        """The numbers of the groups that there is room for."""
        numbers = []
        while True:
            try:
                if not await asyncio.wait_for(self.buffer.room(self.next), 0.01):
                    return numbers
            except TimeoutError:
                return numbers
            self.buffer.begin(self.next, prompt(self.next))
            numbers.append(self.next)
            self.next += 1

    def put(self, *made: TrajectoryGroup) -> None:
        for each in made:
            self.buffer.put(each)

    async def taken(self, step: int) -> list[int]:
        return [each.id.number for each in (await asyncio.wait_for(self.buffer.take(step), 1)).groups]

    async def waits(self, step: int) -> bool:
        """Whether `step` cannot be made yet."""
        try:
            await asyncio.wait_for(self.buffer.take(step), 0.01)
        except TimeoutError:
            return True
        return False


@pytest.mark.parametrize(
    ("staleness", "at_start", "after_first"), [(0, [0, 1], [2, 3]), (1, [0, 1, 2, 3], [4, 5]), (5, [0, 1, 2, 3, 4, 5], [])]
)
def test_admission_follows_versions(staleness, at_start, after_first):
    async def scenario():
        fed = Fed(StepRules(2, staleness))
        assert await fed.admitted_now() == at_start
        fed.put(*map(group, at_start))
        assert await fed.taken(0) == [0, 1]
        assert await fed.admitted_now() == [], "the weights of the step are not out yet"
        fed.buffer.published(1)
        assert await fed.admitted_now() == after_first

    asyncio.run(scenario())


def test_resume_starts_at_its_step():
    async def scenario():
        fed = Fed(StepRules(1, 0), first_step=7, last_step=9)
        assert await fed.admitted_now() == [7]
        fed.put(group(7, version=7))
        assert await fed.taken(7) == [7]
        fed.buffer.published(8)
        assert await fed.admitted_now() == [8]
        fed.put(group(8, version=8))
        assert await fed.taken(8) == [8]
        assert not await fed.buffer.room(9), "the run is done"

    asyncio.run(scenario())


def test_take_waits_for_its_own_groups_in_prompt_order():
    async def scenario():
        fed = Fed(StepRules(2, 1), last_step=2)
        assert await fed.admitted_now() == [0, 1, 2, 3]
        taking = asyncio.ensure_future(fed.buffer.take(0))
        fed.put(group(3, index=9), group(0, index=5))  # a later step's group is quick
        await asyncio.sleep(0.01)
        assert not taking.done()
        assert fed.buffer.finished() == 1
        fed.put(group(1, index=2))
        made = await asyncio.wait_for(taking, 1)
        assert [g.prompt.index for g in made.groups] == [2, 5]
        assert {g.step for g in made.groups} == {0}

    asyncio.run(scenario())


def test_with_oversampling_the_first_to_finish_make_the_step_and_the_others_go_on():
    async def scenario():
        fed = Fed(StepRules(2, 1, oversample=1))
        assert await fed.admitted_now() == [0, 1, 2]
        fed.put(group(2), group(1))
        assert await fed.taken(0) == [1, 2]
        assert await fed.admitted_now() == [], "what goes on is all that is open while the trainer trains"
        fed.buffer.published(1)
        assert await fed.admitted_now() == [3, 4]
        fed.put(group(3, version=1), group(4, version=1))
        assert await fed.waits(1), "group 0 would be too old one step later"
        fed.put(group(0))
        assert await fed.taken(1) == [0, 3]
        fed.buffer.published(2)
        assert await fed.admitted_now() == [5], "the last step takes all that is open"
        fed.put(group(5, version=2))
        assert await fed.taken(2) == [4, 5]
        assert fed.buffer.open == []

    asyncio.run(scenario())


def test_a_group_without_a_difference_is_replaced_up_to_the_bound():
    async def scenario():
        fed = Fed(StepRules(2, 0, max_refills=2))
        assert await fed.admitted_now() == [0, 1]
        fed.put(group(0, rewards=(1.0, 1.0)))
        assert await fed.admitted_now() == [2]
        fed.put(group(2, rewards=(0.0, 0.0)), group(1))
        assert await fed.admitted_now() == [3]
        fed.put(group(3, rewards=(0.0, 0.0)))  # the third: it is trained on as it is
        made = await asyncio.wait_for(fed.buffer.take(0), 1)
        assert [each.id.number for each in made.groups] == [1, 3]
        assert [(each.number, each.end) for each in made.ended] == [(0, End.FILTERED), (2, End.FILTERED)]
        fed.buffer.published(1)
        assert await fed.admitted_now() == [4, 5]
        fed.put(group(4, version=1, rewards=(0.0, 0.0)))  # counted anew for each step
        assert await fed.admitted_now() == [6]

    asyncio.run(scenario())


def test_the_next_group_takes_the_place_of_one_that_failed():
    """One step ahead, a group that runs already moves up, and nobody waits for a new one."""

    async def scenario():
        fed = Fed(StepRules(2, 1), last_step=4)
        assert await fed.admitted_now() == [0, 1, 2, 3]
        failed = FailedAttempt(AttemptId(GroupId(0), 1), "the sandbox is gone", response_length=7)
        fed.put(TrajectoryGroup(prompt(0), [], id=GroupId(0), failed=[failed]), group(1), group(2))
        made = await asyncio.wait_for(fed.buffer.take(0), 1)
        assert [each.id.number for each in made.groups] == [1, 2]
        assert [(each.number, each.end, each.reason) for each in made.ended] == [(0, End.FAILED, "the sandbox is gone")]

    asyncio.run(scenario())


def test_what_its_tokens_say_is_the_age_of_a_group():
    """It was kept from before; the bound holds for it too, and it is not dropped in silence."""

    async def scenario():
        fed = Fed(StepRules(1, 1), first_step=5, last_step=8)
        assert await fed.admitted_now() == [5, 6]
        fed.put(group(5, version=3), group(6, version=4))
        made = await asyncio.wait_for(fed.buffer.take(5), 1)
        assert [each.id.number for each in made.groups] == [6]
        assert [(each.number, each.end) for each in made.ended] == [(5, End.ABORTED)]

    asyncio.run(scenario())


def test_steps_that_were_left_are_not_made_again():
    """A run went back to before a spike, and passes its groups over: how the same step was made then is of no use."""

    async def scenario():
        plans = Plans()
        fates = {number: Fate(5, End.TRAINED, "", str(number)) for number in (10, 11)}
        plans.add(Composition(5, (10, 11), fates, admitted=12), "weights", Place(Path("x"), 0, 0))
        fed = Fed(StepRules(2, 0), first_step=5, last_step=7, admitted=14, decisions=Kept(plans))
        assert await fed.admitted_now() == [14, 15]
        fed.put(group(14, version=5), group(15, version=5))
        assert await fed.taken(5) == [14, 15]
        assert plans.planned(5) is None

    asyncio.run(scenario())


def test_a_step_that_would_be_too_old_now_is_not_made_again():
    """train.staleness was 2 then and is 1 now."""

    async def scenario():
        plans = Plans()
        plans.add(Composition(5, (10,), {10: Fate(5, End.TRAINED, "", "10")}, admitted=12), "weights", Place(Path("x"), 0, 0))
        fed = Fed(StepRules(1, 1), first_step=5, last_step=8, admitted=10, decisions=Kept(plans))
        assert await fed.admitted_now() == [10, 11]
        fed.put(group(10, version=3), group(11, version=5))
        made = await asyncio.wait_for(fed.buffer.take(5), 1)
        assert [each.id.number for each in made.groups] == [11]
        assert [(each.number, each.end) for each in made.ended] == [(10, End.ABORTED)]

    asyncio.run(scenario())


def test_what_followed_from_a_step_that_is_made_otherwise_now_is_forgotten():
    """Otherwise a group would be said to be trained on in a step that it is no part of any more, however old it gets."""

    def made(step, *trained):
        return Composition(step, trained, {n: Fate(step, End.TRAINED, "", str(n)) for n in trained}, admitted=12)

    plans = Plans()
    for composition in (made(2, 8, 9), made(3, 10, 11), made(2, 8, 9)):
        plans.add(composition, "weights", Place(Path("x"), 0, 0))
    assert plans.planned(3) is not None, "it was made again as it was"
    plans.add(made(2, 8), "weights", Place(Path("x"), 0, 0))
    assert (plans.planned(3), plans.fate(9), plans.fate(10)) == (None, None, None)
    assert plans.fate(8) is not None


def test_no_fate_makes_a_group_that_is_too_old_be_trained_on():
    async def scenario():
        plans = Plans()
        plans.add(Composition(2, (9,), {9: Fate(2, End.TRAINED, "", "9")}, admitted=10), "weights", Place(Path("x"), 0, 0))
        fed = Fed(StepRules(1, 1), first_step=3, last_step=8, admitted=9, decisions=Kept(plans))
        assert await fed.admitted_now() == [9, 10]
        fed.put(group(9, version=1), group(10, version=3))
        assert await fed.taken(3) == [10]

    asyncio.run(scenario())


class Kept(Undecided):
    """Decisions of before; new ones are not kept."""

    def __init__(self, plans: Plans) -> None:
        self.planned, self.fate, self.drop_plans = plans.planned, plans.fate, plans.drop


def test_a_step_that_waits_for_an_admission_hears_of_it():
    """As it was made before, the next prompts had been chosen by then."""

    async def scenario():
        plans = Plans()
        plans.add(Composition(0, (0,), {0: Fate(0, End.TRAINED, "", "0")}, admitted=2), "weights", Place(Path("x"), 0, 0))
        fed = Fed(StepRules(1, 1), decisions=Kept(plans))
        fed.buffer.begin(0, prompt(0))
        fed.put(group(0))
        taking = asyncio.ensure_future(fed.buffer.take(0))
        await asyncio.sleep(0)
        assert not taking.done()
        fed.buffer.begin(1, prompt(1))
        assert [each.id.number for each in (await asyncio.wait_for(taking, 1)).groups] == [0]

    asyncio.run(scenario())
