"""Events on their way to the sinks: what is held, what is left out, and how a run's end reaches them."""

from __future__ import annotations

import asyncio
import json
import queue
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.recording import closing_sinks
from ctpo_megatron.record.events import Event, RunReady, ServerLost, StepTrained
from ctpo_megatron.record.incarnation import IncarnationLog
from ctpo_megatron.record.sink_events import PointsLost
from ctpo_megatron.record.sink_feed import SinkFeed
from ctpo_megatron.record.story import read_story
from ctpo_megatron.sinks import worker
from ctpo_megatron.sinks.worker import feed_all

LOST = ServerLost("inference server 3", "it died", again=True)
READY = RunReady(12.0)


def test_events_of_before_are_held_for_the_sinks_and_what_they_have_otherwise_is_left_out() -> None:
    told = list[tuple[Event, float]]()
    sink: Any = SimpleNamespace(event=lambda event, at: told.append((event, at)))
    feed, begun = SinkFeed(), time.time()
    feed(READY)
    feed.begin([sink])
    for event in (LOST, StepTrained(1, 1.0), PointsLost("it", 1, "slow")):
        feed(event)
    assert [event for event, _ in told] == [READY, LOST]
    assert all(begun <= at <= time.time() for _, at in told)
    nowhere = SinkFeed()
    nowhere.begin([])
    nowhere(READY)
    nowhere.begin([sink])
    assert len(told) == 2, "what nobody asked for is not held"


def test_a_run_that_fails_tells_its_sinks_so_and_what_they_lose_stands_behind_its_end(tmp_path: Path) -> None:
    feed, told = SinkFeed(), list[Event]()
    events = IncarnationLog(tmp_path, [told.append, feed])
    lost = iter([(2, "slow"), (0, "")])
    heard = list[str]()
    sink: Any = SimpleNamespace(
        name="it",
        event=lambda event, _at: heard.append(event.name),
        close=lambda: heard.append("closed"),
        lost=lambda: next(lost),
    )

    async def run() -> None:
        async with closing_sinks(feed, events):
            with events:
                events.begin(checkpoint=None, step=0)
                feed.begin([sink])
                raise ConfigError("no")

    with pytest.raises(ConfigError):
        asyncio.run(run())
    assert heard == ["incarnation began", "incarnation ended", "goodput", "closed"]
    (incarnation,) = read_story(tmp_path / "events.jsonl").incarnations
    assert incarnation.how == "failed"
    assert [each.name for each in incarnation.after] == ["goodput", "points lost"]


def ended(line: dict) -> str:
    """How the process of a run ended, as its sinks understand lines that end with this one."""
    lines = queue.Queue()
    said = {"event": "incarnation ended", "at": 1.0, "sentence": "", "fields": {"how": "failed"}}
    for each in (said, line):
        lines.put(None if each is None else json.dumps(each))
    return feed_all(SimpleNamespace(event=lambda _: None), lines)


def test_a_sink_knows_how_the_run_ended() -> None:
    assert ended({"end": True}) == "failed"
    assert ended(None) == "killed"
    lines = queue.Queue()
    lines.put(json.dumps({"end": True}))
    assert feed_all(SimpleNamespace(), lines) == "done"


def test_what_a_sink_gathers_does_not_wait_for_the_next_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FLUSH_S", 0.05)
    lines, flushed = queue.Queue(), list[int]()

    def flush() -> None:
        flushed.append(1)
        if len(flushed) == 2:
            lines.put(json.dumps({"end": True}))

    assert feed_all(SimpleNamespace(flush=flush), lines) == "done"
    assert len(flushed) == 2
