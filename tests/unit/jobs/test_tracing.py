"""Which steps are traced, and what of it is on when: over stand-ins for ranks and servers."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctpo_megatron.cluster.calls import Process
from ctpo_megatron.cluster.trainer.group import TrainerGroup
from ctpo_megatron.cluster.trainer.tracing import RankTrace, read_clock
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.errors import LeftCourse
from ctpo_megatron.jobs.tracing import Traces
from ctpo_megatron.record.events import Event
from ctpo_megatron.record.heartbeat import Stages
from ctpo_megatron.record.spans import MAIN, Span
from ctpo_megatron.record.trace_events import TraceLost, TraceWritten
from ctpo_megatron.record.traces import trace_path

URL = "http://127.0.0.1:1"


class Call:
    """A method of an actor whose answer is there at once."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def options(self, **_options: str) -> Call:
        return self

    def remote(self, *args: Any) -> Any:
        future: Future[Any] = Future()
        future.set_result(self._answer(*args))
        return SimpleNamespace(future=lambda: future)


class Actor:
    """A rank that notes when it is traced, and whose clock may be another host's."""

    def __init__(self, ahead: int = 0) -> None:
        self.said: list[Any] = []
        boot = read_clock()[1] if not ahead else "another"
        self.clock = Call(lambda: (time.monotonic_ns() + ahead, boot))
        self.begin_trace = Call(lambda *files: self.said.append(files))
        self.end_trace = Call(self._end)
        self._ahead = ahead

    def _end(self) -> RankTrace:
        self.said.append("end")
        now = time.monotonic_ns() + self._ahead
        return RankTrace([Span(MAIN, "update", now - 1_000_000, now)], 0, ["no GPU"] if self._ahead else [])


class Requests:
    """Answers as SGLang does."""

    async def request(self, _method: str, _url: str, _body: Any, _timeout_s: float) -> Any:
        return {"meta_info": {"completion_tokens": 5, "id": "x", "finish_reason": {"type": "stop"}}}


class Run:
    """What a step is traced over. `told`: the events."""

    def __init__(self, run_dir: Path, steps: tuple[int, ...], staleness: int) -> None:
        self.actors, self.told = [Actor(), Actor(ahead=10**12)], list[Event]()
        ranks = [Process(f"trainer rank {rank}", actor, run_dir / "log") for rank, actor in enumerate(self.actors)]
        fleet = Fleet(patience_s=1)
        fleet.join("server 0", URL)
        self.stages, self.requests = Stages(), Requests()
        runtime = SimpleNamespace(trainer=TrainerGroup(ranks, 5.0), run_dir=run_dir, fleet=fleet, stages=self.stages)
        trace = SimpleNamespace(steps=steps, profiler=(0, 7), memory=(1,))
        config = SimpleNamespace(trace=trace, train=SimpleNamespace(staleness=staleness))
        client = SimpleNamespace(requests=self.requests)
        self.traces = Traces(runtime, client, config, self.told.append)  # type: ignore[arg-type]

    async def step(self, step: int) -> bool:
        """Make a step; returns whether the driver's spans were gathered in it."""
        async with self.traces(step):
            with self.stages("train", step=step):
                await self.requests.request("POST", f"{URL}/generate", {}, 1.0)
            return "request" in vars(self.requests)


def test_a_step_is_traced_and_its_rollouts_from_where_they_may_begin(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=(4,), staleness=1)

    async def steps() -> list[bool]:
        return [await run.step(step) for step in range(1, 7)]

    assert asyncio.run(steps()) == [False, False, True, True, False, False]
    assert vars(run.requests) == {}
    assert "enter" not in vars(run.stages)
    profile, memory = (str(trace_path(tmp_path, 4, f".rank_{end}")) for end in ("0.profiler.json.gz", "1.memory.pickle"))
    assert run.actors[0].said == [(profile, None), "end"]
    assert run.actors[1].said == [(None, memory), "end"]
    (lost,) = (each for each in run.told if isinstance(each, TraceLost))
    assert lost.reason == "trainer rank 1: no GPU"
    (written,) = (each for each in run.told if isinstance(each, TraceWritten))
    assert (written.step, written.processes, written.spans) == (4, 4, 5)
    assert written.error_us > 0, "another host's clock is not known exactly"
    content = json.loads(gzip.decompress(trace_path(tmp_path, 4).read_bytes()))
    spans = [each for each in content["traceEvents"] if each["ph"] == "X"]
    assert [each["name"] for each in spans] == ["step 4", "train", "/generate", "update", "update"]
    assert spans[2]["args"] == {"completion_tokens": 5, "id": "x"}
    assert all(0 <= each["ts"] < 60e6 for each in spans), "all are on one clock"


def test_a_step_that_breaks_off_leaves_nothing_on(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=(2,), staleness=0)

    async def broken() -> None:
        async with run.traces(2):
            raise LeftCourse("away", step=2, good=1)

    with pytest.raises(LeftCourse):
        asyncio.run(broken())
    assert [actor.said[-1] for actor in run.actors] == ["end", "end"]
    assert vars(run.requests) == {}
    assert not trace_path(tmp_path, 2).exists()


def test_a_trace_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path / "away", steps=(1,), staleness=0)
    asyncio.run(run.step(1))
    assert [type(each) for each in run.told] == [TraceLost, TraceLost]
    assert not (tmp_path / "away").exists()
