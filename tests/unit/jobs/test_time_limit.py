"""The time limit of a job: how early a run stops, what it does when the limit moves, and when SLURM does not answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.errors import StorageError
from ctpo_megatron.jobs.time_limit import ASK_EVERY_S, FLOOR_S, LOOK_S, REMEMBERED, Lead, TimeLimit, time_limit
from ctpo_megatron.loop.orders import Orders
from ctpo_megatron.record.events import CheckpointVerified, Event, StepTrained
from ctpo_megatron.record.run_events import JobEnds, JobEndUnknown
from ctpo_megatron.slurm.commands import SlurmError

DURATION = st.floats(0.0, 10_000.0)
SQUEUE = """#!/bin/sh
echo "$SLURM_TIME_FORMAT $*" >> {asked}
sleep {sleep}
cat {answer}
"""


def lead_of(*, saves: list[float], steps: list[dict[str, float]]) -> Lead:
    lead = Lead()
    for number, seconds in enumerate(saves):
        lead(CheckpointVerified(number, seconds))
    for number, phases in enumerate(steps):
        lead(StepTrained(number, sum(phases.values()), phases, 0.0))
    return lead


class Job:
    """A clock that goes on when somebody pauses, and a SLURM that answers `end_at(now)`, or raises it."""

    def __init__(self, end_at: Callable[[float], float | Exception | None], lead: Lead) -> None:
        self.now, self.asked, self.events = 0.0, [], list[Event]()
        self.orders = Orders()
        self._end_at = end_at
        self.limit = TimeLimit(self._ask, lead, 25.0, self.events.append, lambda: self.now, self._pause)

    def _ask(self) -> float | None:
        self.asked.append(self.now)
        told = self._end_at(self.now)
        if isinstance(told, Exception):
            raise told
        return told

    async def _pause(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 20_000:
            raise TimeoutError

    def run(self) -> None:
        asyncio.run(self.limit.watch(self.orders))

    def named(self, name: str) -> list[Event]:
        return [each for each in self.events if each.name == name]


def test_the_lead_is_a_save_behind_what_it_waits_for() -> None:
    """The longest phases: not the rollouts, which are interrupted, nor the evaluation."""
    assert Lead().seconds == FLOOR_S
    step = {"rollout": 900.0, "batch": 1.0, "sleep": 2.0, "train": 30.0, "publish": 7.0, "evaluate": 500.0}
    assert lead_of(saves=[], steps=[step, {"train": 3.0}]).seconds == FLOOR_S + 1.5 * 40
    assert lead_of(saves=[10.0, 20.0, 5.0], steps=[step]).seconds == FLOOR_S + 1.5 * (40 + 20)
    assert lead_of(saves=[100.0], steps=[step]).seconds == FLOOR_S + 1.5 * (100 + 100)  # one in the background has just begun
    assert lead_of(saves=[1000.0] + [1.0] * REMEMBERED, steps=[]).seconds == FLOOR_S + 1.5 * 2


@given(saves=st.lists(DURATION, max_size=8), steps=st.lists(DURATION, max_size=8))
def test_whatever_was_measured_fits_in_the_lead_again(saves: list[float], steps: list[float]) -> None:
    lead = lead_of(saves=saves, steps=[{"train": each} for each in steps]).seconds
    assert lead >= FLOOR_S + max(steps, default=0.0) + max(saves, default=0.0)


def test_the_order_comes_when_less_than_the_lead_is_left() -> None:
    job = Job(lambda _: 1000.0, lead_of(saves=[20.0], steps=[{"train": 8.0}]))  # 60 + 1.5 * 40 = 120 s
    job.run()
    assert 880.0 < job.now <= 880.0 + 2 * LOOK_S
    assert job.orders.stop_request is not None
    left = 1000.0 - job.now
    assert job.orders.stop_request.reason == f"the job's time limit is {left:.0f} s away, and to stop may take 120 s"
    assert job.orders.stop_request.within_s == left + 25.0
    assert not job.orders.stop_request.again
    assert job.events == [JobEnds(1000.0, 1000.0)]
    assert len(job.asked) == 880 // ASK_EVERY_S + 2  # the first time, now and then, and once to be sure


def test_a_lead_that_grows_meanwhile_counts() -> None:
    lead = Lead()

    def answer(now: float) -> float:
        if now > 300:
            lead(CheckpointVerified(1, 100.0))
        return 1000.0

    job = Job(answer, lead)
    job.run()
    assert job.now == pytest.approx(1000.0 - (FLOOR_S + 1.5 * 200), abs=2 * LOOK_S)


def test_a_limit_that_moves_is_followed() -> None:
    """Later, when the order was about to be given; earlier than it was; and a job whose limit was taken away."""
    later = Job(lambda now: 1000.0 if now < 900 else 3000.0, Lead())
    later.run()
    assert later.now == pytest.approx(3000.0 - FLOOR_S, abs=2 * LOOK_S)
    assert [each.at for each in later.named("job ends")] == [1000.0, 3000.0]
    earlier = Job(lambda now: 5000.0 if now < 900 else 2000.0, Lead())
    earlier.run()
    assert earlier.now == pytest.approx(2000.0 - FLOOR_S, abs=2 * LOOK_S)
    none = Job(lambda now: 1000.0 if now < 900 else None, Lead())
    with pytest.raises(TimeoutError):
        none.run()
    assert none.orders.stop_request is None
    assert none.events[-1] == JobEnds(None, None)


def test_a_limit_that_is_over_still_leaves_the_grace() -> None:
    job = Job(lambda _: -50.0, Lead())
    job.run()
    assert job.orders.stop_request is not None
    assert job.orders.stop_request.within_s == 25.0


def test_slurm_that_does_not_answer_is_told_once_and_what_it_said_counts() -> None:
    def answer(now: float) -> float | Exception:
        return 5000.0 if now < 200 or 1000 < now < 1200 else SlurmError("squeue failed: no answer")

    job = Job(answer, Lead())
    job.run()
    assert job.now == pytest.approx(5000.0 - FLOOR_S, abs=2 * LOOK_S)
    assert [type(each) for each in job.events] == [JobEnds, JobEndUnknown, JobEndUnknown]  # two times without an answer
    assert len(job.asked) < 5000 / ASK_EVERY_S + 3

    never = Job(lambda _: OSError("no more processes"), Lead())
    with pytest.raises(TimeoutError):
        never.run()
    assert never.events == [JobEndUnknown("no more processes")]


def test_a_full_disk_does_not_keep_the_order_back() -> None:
    def full(_event: Event) -> None:
        raise StorageError("no room")

    orders = Orders()
    asyncio.run(TimeLimit(lambda: 10.0, Lead(), 25.0, full, lambda: 0.0).watch(orders))
    assert orders.stop_request is not None


def test_outside_of_slurm_there_is_no_limit() -> None:
    assert time_limit(Lead(), 25.0, lambda _: None, {}) is None


def test_squeue_is_asked_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for SLURM's command that takes half a second, in a job of two parts; the earlier end counts."""
    squeue, asked, answer = tmp_path / "squeue", tmp_path / "asked", tmp_path / "answer"
    squeue.write_text(SQUEUE.format(asked=asked, answer=answer, sleep=0.5))
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    ends = int(time.time()) + 30
    answer.write_text(f"{ends + 100}\n{ends}\n")
    orders, events = Orders(), list[Event]()
    limit = time_limit(Lead(), 25.0, events.append, {"SLURM_JOB_ID": "41", "SLURM_JOB_END_TIME": "9"})
    assert limit is not None

    async def scenario() -> int:
        watching, turns = asyncio.ensure_future(limit.watch(orders)), 0
        while not watching.done():
            await asyncio.sleep(0.01)
            turns += 1
        await watching
        return turns

    assert asyncio.run(scenario()) > 5
    assert asked.read_text() == "%s --noheader --jobs=41 --format=%e\n"
    assert orders.stop_request is not None
    assert [each.at for each in events if isinstance(each, JobEnds)] == [ends]

    squeue.write_text("#!/bin/sh\necho it is down >&2\nexit 1\n")
    assert limit.ask() == 9.0  # newer SLURM told it in the environment
    without = time_limit(Lead(), 25.0, events.append, {"SLURM_JOB_ID": "41"})
    assert without is not None
    with pytest.raises(SlurmError, match="squeue failed: it is down"):
        without.ask()
    squeue.write_text("#!/bin/sh\necho N/A\n")
    assert limit.ask() is None
