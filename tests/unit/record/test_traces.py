"""Spans of a process, and the file that those of all processes make."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import pytest

from ctpo_megatron.record.heartbeat import Stages
from ctpo_megatron.record.spans import MAIN, Span, Spans, around, follow
from ctpo_megatron.record.traces import Clock, Traced, lanes, trace_path, write_trace


class Hand:
    """A clock that is set by hand."""

    now = 0

    def __call__(self) -> int:
        return self.now


class Worker:
    """Something that works."""

    def work(self) -> str:
        return "done"

    async def fetch(self) -> str:
        return "there"


def test_spans_end_are_cut_and_are_forgotten() -> None:
    clock = Hand()
    spans = Spans(clock)
    clock.now = 10
    early = spans.begin("early")
    clock.now = 20
    spans.end(early)
    spans.end(early)
    spans.begin("goes on", "beside", size=3)
    clock.now = 30
    assert spans.between(15, 30) == [Span(MAIN, "early", 10, 20), Span("beside", "goes on", 20, 30, {"size": 3}, cut=True)]
    assert [each.name for each in spans.between(25, 30)] == ["goes on"]
    spans.forget(before=25)
    assert [each.name for each in spans.between(0, 30)] == ["goes on"]


def test_spans_beyond_the_most_are_counted() -> None:
    spans = Spans(most=2)
    for _ in range(5):
        with spans("one"):
            pass
    assert (len(spans.between(0, 2**63)), spans.left_out) == (2, 3)


def test_what_is_put_round_a_method_comes_off() -> None:
    spans, worker = Spans(), Worker()
    offs = [around(worker, "work", spans, "work"), around(Worker, "fetch", spans, "fetch")]
    assert (worker.work(), asyncio.run(Worker().fetch())) == ("done", "there")
    for off in offs:
        off()
    worker.work()
    asyncio.run(worker.fetch())
    assert [each.name for each in spans.between(0, 2**63)] == ["work", "fetch"]
    assert vars(worker) == {}


def test_stages_are_spans_while_they_are_followed() -> None:
    spans, stages = Spans(), Stages()
    with stages("before"):
        off = follow(stages, spans)
        with stages("update", step=3) as stage:
            stage.beat("micro-batch 2")
    off()
    with stages("after"):
        pass
    (only,) = spans.between(0, 2**63)
    assert (only.name, only.details) == ("update", {"step": 3, "detail": "micro-batch 2"})


def test_lanes_hold_what_lies_apart_or_within() -> None:
    whole, part, beside, later = Span("", "a", 0, 10), Span("", "b", 2, 5), Span("", "c", 4, 12), Span("", "d", 12, 13)
    assert lanes([later, beside, part, whole]) == [[whole, part, later], [beside]]


def test_the_file_is_on_the_drivers_clock(tmp_path: Path) -> None:
    path = trace_path(tmp_path, 7)
    ahead = Clock(offset=5_000_000, error=2_000, same=False)
    driver = Traced("driver", [Span(MAIN, "train", 1_000_000, 3_000_000, {"step": 7})])
    rank = Traced("trainer rank 0", [Span("collectives", "allreduce", 6_500_000, 7_000_000, cut=True)], ahead, left_out=4)
    assert write_trace(path, 7, [driver, rank]) == 2
    content = json.loads(gzip.decompress(path.read_bytes()))
    spans = {each["name"]: each for each in content["traceEvents"] if each["ph"] == "X"}
    assert (spans["train"]["ts"], spans["train"]["dur"], spans["train"]["args"]) == (0.0, 2000.0, {"step": 7})
    assert (spans["allreduce"]["ts"], spans["allreduce"]["dur"]) == (500.0, 500.0)
    assert "cut" in spans["allreduce"]["args"]
    assert content["otherData"]["clocks"]["trainer rank 0"] == {"offset": 5_000_000, "error": 2_000, "same": False}
    assert content["otherData"]["left_out"] == {"trainer rank 0": 4}
    names = {each["args"]["name"] for each in content["traceEvents"] if each["name"] == "process_name"}
    assert names == {"driver", "trainer rank 0"}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_the_same_clock_has_no_error_and_others_have_half_of_the_way() -> None:
    clocks = pytest.importorskip("ctpo_megatron.cluster.trainer.clocks")
    assert clocks.compare(1_000, 3_000, 2_400, same_host=True) == Clock()
    other = clocks.compare(1_000, 3_000, 52_000, same_host=False)
    assert other == Clock(50_000, 1_001, same=False)
    assert clocks.compare(1_000, 3_000, 52_000, same_host=True) == other, "hosts that claim to be one, and are not"
    assert clocks.between(other, Clock(50_400, 500, same=False)) == Clock(50_200, 1_201, same=False)
