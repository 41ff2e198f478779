"""Stages: what a process says it is doing, and when it is late by its own history."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.record.heartbeat import MARGIN_S, REMEMBERED, TIMES, Depths, Patience, Stages, stage
from ctpo_megatron.record.timer import PhaseTimer

SECONDS = st.floats(0.0, 1000.0)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_says_what_it_is_and_for_how_long() -> None:
    clock = Clock()
    stages = Stages(clock)
    assert stages.now() == ()
    with stages("update", step=41, waits_for="all ranks") as entered:
        clock.now += 3
        entered.beat("micro-batch 2")
        clock.now += 2
        (now,) = stages.now()
    assert str(now) == "update of step 41, micro-batch 2"
    assert (now.seconds, now.silent_s, now.usual_s, now.waits_for) == (5, 2, None, "all ranks")
    assert (now.thread, now.native_thread) == (threading.get_ident(), threading.get_native_id())
    assert stages.now() == ()


@given(st.lists(st.lists(SECONDS, min_size=1, max_size=5), min_size=1, max_size=2 * REMEMBERED))
def test_the_usual_silence_is_the_median_of_the_longest_ones(runs: list[list[float]]) -> None:
    """A stage that beats often is missed soon, however long it takes: its silences are learned, not its duration."""
    clock = Clock()
    stages = Stages(clock)
    longest = []
    for gaps in runs:
        with stages("update") as entered:
            found, begun = 0.0, clock.now
            for gap in gaps:
                before = clock.now
                clock.now += gap
                found = max(found, clock.now - before)
                entered.beat()
            assert clock.now - begun >= 0
        longest.append(found)
    last = sorted(longest[-REMEMBERED:])
    median = (last[(len(last) - 1) // 2] + last[len(last) // 2]) / 2
    assert stages.usual_s("update") == pytest.approx(median)
    assert stages.usual_s("save") is None


@given(SECONDS, SECONDS, SECONDS)
def test_deadlines(floor: float, first: float, usual: float) -> None:
    patience = Patience(floor, first)
    assert patience.deadline_s(None) == first
    assert patience.deadline_s(usual) >= TIMES * usual + MARGIN_S
    assert patience.deadline_s(usual) >= floor + MARGIN_S
    if TIMES * usual >= floor:  # the promise: three times what is usual, and ten seconds
        assert patience.deadline_s(usual) == TIMES * usual + MARGIN_S


def test_stages_of_several_threads_and_tasks_stand_beside_one_another() -> None:
    clock = Clock()
    stages = Stages(clock)
    first, second = stages.enter("rollout"), stages.enter("write checkpoint")
    clock.now += 7
    second.beat()
    stages.leave(first)
    stages.leave(first)
    assert [(each.name, each.silent_s) for each in stages.now()] == [("write checkpoint", 0)]
    assert stages.usual_s("rollout") == 7
    clock.now += 2
    stages.beat()
    stages.leave(second)
    assert stages.usual_s("write checkpoint") == 7


def test_a_stage_that_fails_is_left() -> None:
    stages = Stages()
    with pytest.raises(ValueError, match="no"), stages("update"):
        raise ValueError("no")
    assert stages.now() == ()


def test_a_decorated_call_is_a_stage_at_its_version() -> None:
    class Actor:
        def __init__(self) -> None:
            self.stages = Stages()
            self.seen: list[str] = []

        @stage("update")
        def update(self, batch: str, version: int) -> str:
            """Says."""
            self.seen += [str(each) for each in self.stages.now()]
            return batch

        @stage("load")
        def load(self) -> None:
            self.seen += [str(each) for each in self.stages.now()]

    actor = Actor()
    assert (actor.update("a", 3), actor.update("b", version=4)) == ("a", "b")
    actor.load()
    assert actor.seen == ["update of step 3", "update of step 4", "load"]
    assert Actor.update.__doc__ == "Says."


def test_phases_of_the_driver_are_stages() -> None:
    stages = Stages()
    timer = PhaseTimer(stages=stages, step=2)
    with timer("rollout"):
        assert [str(each) for each in stages.now()] == ["rollout of step 2"]
    assert stages.now() == ()
    assert timer.seconds["rollout"] >= 0


def test_depths_count_who_waits_and_the_longest_wait() -> None:
    clock = Clock()
    depths = Depths(clock)
    with depths("the tool"):
        clock.now += 5
        with depths("the tool"), depths("a verdict"):
            clock.now += 1
            assert depths.now() == {"the tool": (2, 6), "a verdict": (1, 1)}
    assert depths.now() == {"the tool": (0, 0), "a verdict": (0, 0)}
