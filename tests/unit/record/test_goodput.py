"""Where a run's time went: every millisecond has one cause, whatever events say, and the causes are the right ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.record.goodput import Account, Cause, account
from ctpo_megatron.record.story import Happened, Story, tell
from ctpo_megatron.record.timeline import Timeline
from tests.support.often import often

PHASES = {"rollout": 4.0, "batch": 0.5, "sleep": 0.25, "train": 3.0, "publish": 1.0}  # of a step of 10 s: 1.25 s lie between them
T0 = 1_000.0


def began(at: float, number: int, step: int = 0, **fields: Any) -> Happened:
    checkpoint = f"step_{step}" if step else None
    own = {
        "number": number,
        "checkpoint": checkpoint,
        "step": step,
        "process": at,
        "allocated": at,
        "job": None,
        "restarts": None,
    }
    return Happened(at, "incarnation began", own | fields)


def ended(at: float, number: int, how: str, noticed: float | None = None) -> Happened:
    return Happened(at if noticed is None else noticed, "incarnation ended", {"number": number, "how": how, "at": at})


def step(at: float, number: int, seconds: float = 10.0, **phases: float) -> Happened:
    return Happened(at, "step", {"step": number, "seconds": seconds, "phases": {**PHASES, **phases}, "rollout_tail": 1.0})


def happened(at: float, name: str, **fields: Any) -> Happened:
    return Happened(at, name, fields)


def seconds(of: Account) -> dict[str, float]:
    return {str(cause): value for cause, value in of.seconds.items() if value}


def adds_up(events: list[Happened], now: float | None = None) -> None:
    found = account(tell(events), now)
    for each in [*found.incarnations.values(), found.total]:
        assert sum(each.milliseconds.values()) == each.elapsed
        assert all(value >= 0 for value in each.milliseconds.values())
        assert 0.0 <= each.goodput <= 1.0
        for allocated in (False, True):
            assert sum(each.shares(allocated=allocated).values()) == pytest.approx(1.0 if each.allocated else 0.0, abs=1e-9) or (
                not allocated and each.elapsed
            )
        json.dumps(each.summary(), allow_nan=False)
    waits = found.total.milliseconds[Cause.WAIT]
    assert found.total.elapsed == sum(each.elapsed for each in found.incarnations.values()) + waits


def test_a_whole_run_by_hand() -> None:
    events = [
        began(T0, 1),
        happened(T0 + 20, "ready"),
        happened(T0 + 22, "evaluation", step=0, seconds=1.5),
        step(T0 + 32, 1),
        step(T0 + 45, 2, 13.0, evaluate=2.0, checkpoint=1.0),
        ended(T0 + 50, 1, "done"),
    ]
    found = account(tell(events))
    assert seconds(found.total) == {
        "start": 20.0,
        "evaluate": 1.5 + 2.0,
        "rollout": 2 * 3.0,
        "rollout tail": 2 * 1.0,
        "train": 2 * 3.5,
        "publish": 2 * 1.25,
        "checkpoint": 1.0,
        "other": 0.5 + 2 * 1.25,
        "stop": 5.0,
    }
    assert (found.total.useful, found.total.allocated, found.total.elapsed) == (15_000, 50_000, 50_000)
    assert found.total.goodput == 15 / 50
    assert found.event().sentence.startswith("goodput 30.0% of 50 s in 1 incarnations (start 20 s, train 7 s")


def test_what_was_trained_behind_the_checkpoint_is_lost_and_the_wait_is_nobodys() -> None:
    events = [
        began(T0, 1),
        happened(T0 + 10, "ready"),
        step(T0 + 20, 1),
        step(T0 + 30, 2),
        happened(T0 + 31, "checkpoint verified", step=2, seconds=2.0),
        step(T0 + 40, 3),
        happened(T0 + 45, "evaluation", step=4, seconds=2.0),  # of a step whose event did not come any more
        ended(T0 + 47, 1, "killed", noticed=T0 + 100),
        happened(T0 + 100, "setting differs"),
        began(T0 + 100, 2, step=2),
        happened(T0 + 103, "resumed", step=2),
        happened(T0 + 105, "ready"),
        step(T0 + 115, 3),
        ended(T0 + 116, 2, "done"),
    ]
    found = account(tell(events))
    first, second = found.incarnations[1], found.incarnations[2]
    assert seconds(first)["lost work"] == 17.0
    assert first.elapsed == 47_000
    assert (seconds(second)["restart"], seconds(second)["stop"]) == (5.0, 1.0)
    assert (found.total.elapsed, found.total.allocated) == (116_000, 63_000)
    assert found.total.seconds[Cause.WAIT] == 53.0
    assert found.total.useful == 3 * 7_500
    assert found.total.shares(allocated=False)[Cause.WAIT] == 53 / 116
    assert found.total.shares(allocated=True)[Cause.WAIT] == 0.0


def test_a_failure_without_a_successor_counts_what_no_checkpoint_holds_as_lost() -> None:
    begin = [began(T0, 1), happened(T0 + 10, "ready"), step(T0 + 20, 1), step(T0 + 30, 2)]
    saved = happened(T0 + 31, "checkpoint verified", step=1, seconds=1.0)
    for how, lost in (("failed", 15.0), ("cancelled", 15.0), ("killed", 15.0), ("done", 0.0), ("stopped", 0.0)):
        found = account(tell([*begin, saved, ended(T0 + 35, 1, how)]))
        assert found.total.seconds[Cause.LOST] == lost, how
    assert account(tell([*begin, ended(T0 + 35, 1, "failed")])).total.seconds[Cause.LOST] == 25.0
    assert account(tell(begin), T0 + 35).total.seconds[Cause.LOST] == 0.0  # it goes on


def test_a_stop_in_order_keeps_what_was_under_way() -> None:
    events = [began(T0, 1), happened(T0 + 10, "ready"), step(T0 + 20, 1), happened(T0 + 24, "stop requested", reason="SIGUSR1")]
    assert seconds(account(tell([*events, ended(T0 + 30, 1, "stopped")])).total) == {
        "start": 10.0,
        "rollout": 3.0 + 4.0,
        "rollout tail": 1.0,
        "train": 3.5,
        "publish": 1.25,
        "other": 1.25,
        "stop": 6.0,
    }
    cancelled = account(tell([*events, ended(T0 + 30, 1, "cancelled")])).total.seconds
    assert (cancelled[Cause.LOST], cancelled[Cause.STOP]) == (14.0, 6.0)


@pytest.mark.parametrize("job", [None, "7"])
def test_a_second_process_in_the_same_allocation_waits_for_no_queue(job: str | None) -> None:
    own = {"job": job, "restarts": 0, "allocated": T0 - 30.0}
    events = [
        began(T0, 1, **own),
        ended(T0 + 10, 1, "failed"),
        began(T0 + 15, 2, **(own if job else {})),
        ended(T0 + 20, 2, "failed"),
        began(T0 + 90, 3, **(own | {"restarts": 1, "allocated": T0 + 80.0} if job else {})),
    ]
    total = account(tell(events), T0 + 100).total
    assert seconds(total) == {
        "start": 40.0,  # from when SLURM gave the nodes
        "restart": 10.0 + 20.0 if job else 5.0 + 10.0,
        "requeue wait": 60.0 if job else 5.0 + 70.0,
    }


def test_a_new_run_in_the_directory_of_a_failed_one_loses_all_of_it() -> None:
    first = [began(T0, 1), happened(T0 + 5, "ready"), happened(T0 + 6, "evaluation", step=0, seconds=1.0), step(T0 + 16, 1)]
    again = [began(T0 + 20, 2), happened(T0 + 25, "ready"), step(T0 + 35, 1)]
    found = account(tell([*first, ended(T0 + 20, 1, "killed"), *again]))
    assert seconds(found.incarnations[1]) == {"start": 5.0, "lost work": 15.0}
    assert found.incarnations[2].seconds[Cause.LOST] == 0.0


def test_a_step_that_is_trained_again_in_one_incarnation_is_lost_the_first_time() -> None:
    lost = happened(T0 + 37, "trainer restarting", reason="rank 1 was stopped", restart=1, of=3, wait_s=0.0)
    stalled = happened(T0 + 37, "stall", acts=True, seconds=5.0)
    back = happened(T0 + 41, "trainer restarted", step=1, seconds=4.0)
    begin = [began(T0, 1), happened(T0 + 10, "ready"), step(T0 + 20, 1), step(T0 + 30, 2)]
    total = account(tell([*begin, stalled, lost, back, step(T0 + 51, 2)])).total
    # step 2 and two seconds after it are lost, then it stands still for 5 s, and is back 4 s later
    assert [total.seconds[cause] for cause in (Cause.LOST, Cause.STALL, Cause.RESTART)] == [12.0, 5.0, 4.0]
    assert account(tell([*begin, happened(T0 + 37, "stall", acts=False, seconds=5.0)])).total.seconds[Cause.STALL] == 0.0


def test_a_process_that_begins_anew_is_one_allocation() -> None:
    same = {"host": "n1", "pid": 7, "process": T0}
    ready, again = happened(T0 + 10, "ready"), happened(T0 + 34, "ready")
    events = [began(T0, 1, **same), ready, ended(T0 + 20, 1, "failed"), began(T0 + 24, 2, **same), again]
    found = account(tell(events), T0 + 40)
    assert (found.total.seconds[Cause.WAIT], found.total.seconds[Cause.RESTART]) == (0.0, 14.0)


def test_phases_that_claim_more_than_the_step_share_it() -> None:
    events = [
        began(T0, 1),
        happened(T0 + 1, "ready"),
        step(T0 + 11, 1, rollout=31.0, batch=3.0, train=2.0, sleep=0.0, publish=4.0),
    ]
    found = seconds(account(tell(events)).total)
    assert (found["train"], found["publish"], found["rollout"] + found["rollout tail"]) == (1.25, 1.0, 7.75)


def test_nothing_is_nothing() -> None:
    assert account(Story()).total.goodput == 0.0
    assert account(Story()).summary()["incarnations"] == {}


TIMES = st.one_of(st.floats(0, 2000), st.floats(allow_nan=False, allow_infinity=False), st.integers(-5, 1500).map(float))
ANYTHING = st.one_of(TIMES, st.just("NaN"), st.none(), st.integers(-3, 12), st.booleans(), st.text(max_size=3))
NAMES = [
    "step",
    "evaluation",
    "ready",
    "resumed",
    "checkpoint verified",
    "stop requested",
    "stall",
    "trainer restarting",
    "trainer restarted",
    "done",
    "unknown",
]
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "step": ANYTHING,
        "seconds": ANYTHING,
        "rollout_tail": ANYTHING,
        "acts": st.booleans(),
        "phases": st.one_of(ANYTHING, st.dictionaries(st.sampled_from([*PHASES, "evaluate", "checkpoint", "new"]), ANYTHING)),
    },
)
ENDS = st.fixed_dictionaries(
    {"how": st.sampled_from(["done", "stopped", "cancelled", "failed", "killed"])}, optional={"at": ANYTHING, "number": ANYTHING}
)
BEGINS = st.fixed_dictionaries(
    {},
    optional={
        "process": ANYTHING,
        "allocated": ANYTHING,
        "job": st.sampled_from([None, "7", "8"]),
        "restarts": st.sampled_from([None, 0, 1]),
        "step": ANYTHING,
        "checkpoint": st.sampled_from([None, "step_4"]),
    },
)
EVENTS = st.one_of(
    st.builds(Happened, TIMES, st.sampled_from(NAMES), FIELDS),
    st.builds(Happened, TIMES, st.just("incarnation ended"), ENDS),
    st.builds(Happened, TIMES, st.just("incarnation began"), BEGINS),
)


@settings(max_examples=often(100), deadline=None)
@given(st.lists(EVENTS, max_size=20), st.one_of(st.none(), TIMES))
def test_any_sequence_of_events_adds_up(events: list[Happened], now: float | None) -> None:
    number, numbered = 0, []
    for each in events:
        if each.name == "incarnation began":
            number += 1
            each = Happened(each.time, each.name, {**each.fields, "number": number})
        numbered.append(each)
    adds_up(numbered, now)


@settings(max_examples=often(100), deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 45), st.integers(-5, 45), st.sampled_from("abc"))), st.integers(0, 40))
def test_a_timeline_is_what_painting_every_millisecond_gives(strokes: list[tuple[int, int, str]], end: int) -> None:
    line, slow = Timeline(0, end, "x"), ["x"] * end
    for first, last, owner in strokes:
        line.paint(first, last, owner)
        for at in range(max(first, 0), min(last, end)):
            slow[at] = owner
    assert line.totals() == {owner: slow.count(owner) for owner in set(slow)}


def test_a_story_of_many_steps_is_quick() -> None:
    events = [began(T0, 1), happened(T0 + 1, "ready")]
    events += [step(T0 + 1 + 10.0 * n, n) for n in range(1, 4_001)]
    assert account(tell(events)).total.goodput == pytest.approx(0.75, rel=1e-3)
