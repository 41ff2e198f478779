"""Who is to blame when a run stands still: planted faults of every kind, at every place."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.record.heartbeat import Patience, Stage
from ctpo_megatron.record.stall_report import Scene, next_report, render, write_report
from ctpo_megatron.record.stalls import Collective, Condition, Evidence, Seen, Verdict, judge, stopped
from ctpo_megatron.record.watch_events import StallFound

PATIENCE = Patience(floor_s=30.0, first_s=600.0)
DEADLINE_S = 40.0  # of a stage that is usually silent for a second
STOPPED_AFTER_S = 4.0


def stage_of(silent_s: float, name: str = "update", usual_s: float | None = 1.0) -> Stage:
    return Stage(name, 41, "", silent_s + 5, silent_s, usual_s, "", 1, 1)


def rank(number: int, silent_s: float = 0.0, *calls: Collective, cpus: float = 0.0, unanswered_s: float = 0.0) -> Seen:
    name = f"trainer rank {number}"
    condition = Condition("sleeping", 9.0, 9, cpus)
    return Seen(name, name, 100 + number, number, (stage_of(silent_s),), unanswered_s, condition, tuple(calls))


def call(group: str, ranks: tuple[int, ...], entered: int, *, inside: bool = True) -> Collective:
    return Collective(group, ranks, entered, "all_reduce", 50.0, inside)


def judged(seen: list[Seen]) -> Verdict:
    verdict = judge(seen, PATIENCE, STOPPED_AFTER_S)
    assert verdict is not None
    return verdict


@given(st.lists(st.floats(0.0, DEADLINE_S - 0.1), min_size=1, max_size=6))
def test_nobody_is_blamed_before_a_deadline(silences: list[float]) -> None:
    ranks = tuple(range(len(silences)))
    seen = [rank(each, silence, call("dp", ranks, each)) for each, silence in enumerate(silences)]
    assert judge(seen, PATIENCE, STOPPED_AFTER_S) is None


def test_an_idle_process_is_never_late() -> None:
    idle = replace(rank(0), stages=())
    assert judge([idle], PATIENCE, STOPPED_AFTER_S) is None


def test_a_process_that_has_never_answered_is_late_after_the_first_deadline() -> None:
    def new(seconds: float) -> Seen:
        return Seen("trainer rank 0", "trainer rank 0", rank=0, unanswered_s=seconds)

    assert judge([new(599)], PATIENCE, STOPPED_AFTER_S) is None
    assert judged([new(601)]).culprits == ("trainer rank 0",)


@given(data=st.data(), count=st.integers(2, 8))
def test_the_rank_that_is_behind_is_blamed_and_the_edge_is_named(data: st.DataObject, count: int) -> None:
    """Everybody is late alike: they wait in one call for the one that has not entered it."""
    culprit = data.draw(st.integers(0, count - 1))
    ranks = tuple(range(count))
    seen = [
        rank(each, 60.0, call("dp", ranks, 6 if each == culprit else 7, inside=each != culprit), cpus=0.9 * (each == culprit))
        for each in ranks
    ]
    verdict = judged(data.draw(st.permutations(seen)))
    assert (verdict.kind, verdict.culprits) == ("hung", (f"trainer rank {culprit}",))
    assert f"waits in all_reduce (group dp, call 7) for trainer rank {culprit}, for 50 s" in verdict.sentence
    assert "it spins" in verdict.sentence
    assert len(verdict.edges) == count - 1


@given(data=st.data(), length=st.integers(2, 8))
def test_a_chain_of_waits_is_followed_to_its_end(data: st.DataObject, length: int) -> None:
    """Rank n waits in a group of two for rank n + 1, which waits in another one, and so on: the last one is to blame."""
    seen = []
    for each in range(length):
        calls = []
        if each > 0:
            calls.append(call(f"g{each - 1}", (each - 1, each), 3, inside=False))
        if each < length - 1:
            calls.append(call(f"g{each}", (each, each + 1), 4))
        seen.append(rank(each, 60.0 + each, *calls))
    verdict = judged(data.draw(st.permutations(seen)))
    assert verdict.culprits == (f"trainer rank {length - 1}",)


@given(st.integers(2, 6))
def test_a_circle_is_a_deadlock(length: int) -> None:
    seen = []
    for each in range(length):
        before, after = (each - 1) % length, (each + 1) % length
        calls = [call(f"g{before}", (before, each), 1, inside=False), call(f"g{each}", (each, after), 2)]
        seen.append(rank(each, 60.0, *calls))
    verdict = judged(seen)
    assert verdict.kind == "deadlock"
    assert set(verdict.culprits) == {f"trainer rank {each}" for each in range(length)}


def test_all_in_one_call_is_the_network_or_a_device() -> None:
    verdict = judged([rank(each, 60.0, call("dp", (0, 1), 7)) for each in range(2)])
    assert (verdict.kind, verdict.culprits) == ("collective", ("trainer rank 0", "trainer rank 1"))
    assert "all entered all_reduce (group dp, call 7)" in verdict.sentence


def test_whoever_waits_for_one_that_is_not_late_names_a_slow_one() -> None:
    seen = [rank(0, 60.0, call("dp", (0, 1), 7)), rank(1, 2.0, call("dp", (0, 1), 6, inside=False))]
    verdict = judged(seen)
    assert (verdict.kind, verdict.culprits, verdict.acts) == ("slow", ("trainer rank 1",), False)


def test_a_rank_that_does_not_answer_is_to_blame_where_nobody_is_known_to_be_behind() -> None:
    silent = rank(1, 20.0, unanswered_s=45.0, cpus=1.0)
    verdict = judged([rank(0, 60.0, call("dp", (0, 1), 7)), silent])
    assert (verdict.kind, verdict.culprits) == ("hung", ("trainer rank 1",))
    assert "has not answered for 45 s and computes on 1.0 processors" in verdict.sentence


def test_a_pipeline_neighbour_is_waited_for() -> None:
    exchange = Collective("pp", (0, 1), 0, "an exchange with its pipeline neighbours", 50.0, True, peers=(0,))
    verdict = judged([rank(0, 61.0), rank(1, 60.0, exchange)])
    assert verdict.culprits == ("trainer rank 0",)
    assert "trainer rank 1 waits in an exchange with its pipeline neighbours (group pp) for trainer rank 0" in verdict.sentence


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (Condition("disk-sleep", 50.0, 50, 0.0, "rpc_wait_bit_killable"), "is blocked in the kernel, as by a disk or network"),
        (Condition("sleeping", 50.0, 50, 0.0, "pipe_read"), r"uses no processor: it waits \(pipe_read\)"),
        (Condition("running", 50.0, 50, 1.0), "computes on 1.0 processors: it spins"),
        (Condition("running", 50.0, 50, 0.2), "wants a processor and gets 0.2 of one: it spins, or others have the processors"),
        (Condition("running", 50.0, 50, 0.4, waited=0.3), "wants a processor and gets 0.4 of one: it spins$"),
        (Condition("running", 50.0, 50, 1.0, waited=0.3), "computes on 1.0 processors: it spins"),
        (
            Condition("running", 50.0, 50, 0.0, waited=0.97),
            "starves: it waits for a processor 97% of the time, and uses 0.0 of one",
        ),
        (
            Condition("sleeping", 50.0, 50, 1.5, waited=0.6),
            "starves: it waits for a processor 60% of the time, and uses 1.5 of one",
        ),
        (None, "the system does not tell"),
    ],
)
def test_what_the_system_says_is_told(condition: Condition | None, words: str) -> None:
    verdict = judged([replace(rank(0, 60.0), condition=condition)])
    assert re.search(words, verdict.sentence)


@given(
    state=st.sampled_from(["stopped", "tracing-stop", "sleeping", "running", "disk-sleep"]),
    since=st.floats(0.0, 10.0),
    looks=st.integers(1, 8),
)
def test_stopped_is_a_state_that_lasts(state: str, since: float, looks: int) -> None:
    """A debugger's glance, and the first look of a watch that was itself stopped, count for nothing."""
    seen = [replace(rank(0), condition=Condition(state, since, looks, 0.0))]
    assert bool(stopped(seen, STOPPED_AFTER_S)) == (state in ("stopped", "tracing-stop") and since >= 4.0 and looks >= 3)


def test_a_stopped_process_is_named_with_what_it_did_and_who_waits_for_it() -> None:
    halted = replace(rank(1, 2.0, unanswered_s=5.0), condition=Condition("stopped", 5.0, 6, 0.0), place="attention of layer 12")
    verdict = judged([rank(0, 6.0, call("tp", (0, 1), 7)), halted])
    assert (verdict.kind, verdict.culprits) == ("stopped", ("trainer rank 1",))
    assert verdict.sentence == (
        "trainer rank 1 is stopped (SIGSTOP) for 5 s; last heard in update of step 41, in attention of layer 12; "
        "trainer rank 0 waits in all_reduce (group tp, call 7) for trainer rank 1, for 50 s"
    )


def test_a_part_of_a_server_is_blamed_on_its_server() -> None:
    server = Seen("inference server 0", "inference server 0", 7, stages=(stage_of(50.0, "serving"),))
    scheduler = Seen("inference server 0: scheduler", "inference server 0", 8, condition=Condition("running", 50, 50, 1.0))
    hung = judged([server, scheduler])
    assert (hung.culprits, hung.owners) == (("inference server 0",), ("inference server 0",))
    assert "inference server 0: scheduler computes on 1.0 processors: it spins" in hung.sentence
    halted = judged([server, replace(scheduler, condition=Condition("stopped", 5, 5, 0.0))])
    assert (halted.culprits, halted.owners) == (("inference server 0: scheduler",), ("inference server 0",))


def test_the_report_says_everything_that_was_seen(tmp_path: Path) -> None:
    seen = [rank(0, 60.0, call("dp", (0, 1), 7)), rank(1, 60.0, call("dp", (0, 1), 6, inside=False), cpus=1.0)]
    evidence = {"trainer rank 0": Evidence(recent=("12:00:00 gloo:all_reduce",), stacks="thread a: reduces")}
    scene = Scene(
        seen,
        PATIENCE,
        evidence,
        {"trainer rank 1": "thread b: spins"},
        [stage_of(60.0, "train")],
        0.25,
        {"the tool": (3, 4.0)},
        {"inference server 0": "serving"},
        "The process is ended.",
    )
    text = render(judged(seen), scene, when="noon")
    for words in (
        "# Trainer rank 1 shows no progress for 60 s in update of step 41",
        "Seen noon; kind: hung. The process is ended.",
        "- trainer rank 0 waits in all_reduce (group dp, call 7) for trainer rank 1, for 50 s",
        "| trainer rank 1 | 101 | update of step 41 | 60 s | 40 s | yes | sleeping for 9 s, 1.0 processors |",
        "- train of step 41 since 65 s",
        "- event loop: 250 ms late",
        "- waiting for the tool: 3, the longest for 4.0 s",
        "- inference server 0 is serving",
        "12:00:00 gloo:all_reduce",
    ):
        assert words in text
    starving = render(
        judged(seen), replace(scene, seen=[replace(seen[0], condition=Condition("running", 9.0, 9, 0.1, waited=0.8))])
    )
    assert "running for 9 s, 0.1 processors, 80% waiting for one |" in starving
    assert text.index("thread b: spins") < text.index("thread a: reduces")  # whoever is to blame comes first
    assert next_report(tmp_path).name == "001.md"
    write_report(next_report(tmp_path), judged(seen), scene)
    assert next_report(tmp_path).name == "002.md"


def test_the_event_is_one_sentence() -> None:
    event = StallFound("hung", ("trainer rank 1",), "trainer rank 1 spins", "r/stalls/001.md", True, 12.0)
    assert event.sentence == "stall: trainer rank 1 spins. Report: r/stalls/001.md"
