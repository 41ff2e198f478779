"""The steps that `trace.steps` names, traced over all processes of a run."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.cluster.trainer.clocks import between, measure_clocks
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import State
from ctpo_megatron.engine.tracing import GENERATE, TRACK, trace_requests
from ctpo_megatron.errors import CtpoError, StorageError
from ctpo_megatron.record.events import Emit
from ctpo_megatron.record.spans import MAIN, Span, Spans, follow
from ctpo_megatron.record.trace_events import TraceLost, TraceWritten
from ctpo_megatron.record.traces import Clock, Traced, trace_path, write_trace

CLOCK_TIMEOUT_S = 30.0


class Traces:
    """Traces steps of a run over `runtime` and `client`. Call it with a step, counted from 1, for the context of that step."""

    def __init__(self, runtime: Runtime, client: EngineClient, config: RunConfig, emit: Emit) -> None:
        self._runtime, self._client, self._config, self._emit = runtime, client, config.trace, emit
        self._lead = config.train.staleness  # rollouts of a step begin as many steps before it
        self._spans: Spans | None = None  # of the driver, while a step is traced or soon will be
        self._ends: list[Callable[[], None]] = []

    @contextlib.asynccontextmanager
    async def __call__(self, step: int) -> AsyncIterator[None]:
        """A context in which `step` is made; its trace is written behind it, if it is one of those."""
        if not any(step <= each <= step + self._lead for each in self._config.steps):
            yield
            return
        spans = self._follow()
        try:
            if step in self._config.steps:
                async with self._traced(step, spans):
                    yield
            else:
                yield
        finally:
            if not any(step < each <= step + 1 + self._lead for each in self._config.steps):
                self.close()

    def close(self) -> None:
        """Gather no more. Safe to call twice."""
        for end in reversed(self._ends):
            end()
        self._ends, self._spans = [], None

    def _follow(self) -> Spans:
        if self._spans is None:
            self._spans = Spans()
            self._ends = [follow(self._runtime.stages, self._spans), trace_requests(self._client.requests, self._spans)]
        return self._spans

    @contextlib.asynccontextmanager
    async def _traced(self, step: int, spans: Spans) -> AsyncIterator[None]:
        runtime, config = self._runtime, self._config
        ranks, trainer = runtime.trainer.ranks, runtime.trainer
        files = [
            {rank: trace_path(runtime.run_dir, step, f".rank_{rank}.{name}") for rank in of if rank < len(ranks)}
            for of, name in ((config.profiler, "profiler.json.gz"), (config.memory, "memory.pickle"))
        ]
        before = await self._clocks(step)
        if before is None:
            yield
            return
        await trainer.begin_trace(*files)
        begun = time.monotonic_ns()
        try:
            yield
        except BaseException:
            trainer.drop_trace()
            raise
        ended = time.monotonic_ns()
        found = await trainer.end_trace()
        clocks = [between(*both) for both in zip(before, await self._clocks(step) or before, strict=True)]
        of_ranks = [
            Traced(rank.name, each.spans, clock, each.left_out) for rank, each, clock in zip(ranks, found, clocks, strict=True)
        ]
        for rank, each in zip(ranks, found, strict=True):
            for lost in each.lost:
                self._emit(TraceLost(step, f"{rank.name}: {lost}"))
        whole = Span(MAIN, f"step {step}", begun, ended)
        traced = [*self._of_driver(spans, whole), *of_ranks]
        spans.forget(before=begun)
        await self._write(step, ended, traced)

    async def _clocks(self, step: int) -> list[Clock] | None:
        """Returns the clocks of the ranks; None where some do not answer. Whether they live is for others to find out."""
        try:
            return await measure_clocks(self._runtime.trainer.ranks, CLOCK_TIMEOUT_S)
        except CtpoError as error:
            self._emit(TraceLost(step, f"the ranks' clocks are not known: {error}"))
            return None

    def _of_driver(self, spans: Spans, whole: Span) -> list[Traced]:
        """Returns the driver's own spans, and each server's requests, as the driver sees them, as a process of their own."""
        found = spans.between(whole.begin, whole.end)
        servers = {}
        for member in self._runtime.fleet.members(*State):
            name = f"{TRACK}{member.url}"
            servers[member.name] = [replace(each, track=_kind(each)) for each in found if each.track == name]
        own = [whole, *(each for each in found if not each.track.startswith(TRACK))]
        return [Traced("driver", own, Clock(), spans.left_out), *(Traced(name, each) for name, each in servers.items())]

    async def _write(self, step: int, ended: int, traced: list[Traced]) -> None:
        path: Path = trace_path(self._runtime.run_dir, step)
        try:
            count = await asyncio.to_thread(write_trace, path, step, traced)
        except StorageError as error:
            self._emit(TraceLost(step, str(error)))
            return
        error_us = max(each.clock.error for each in traced) / 1000
        left_out, seconds = sum(each.left_out for each in traced), (time.monotonic_ns() - ended) / 1e9
        self._emit(TraceWritten(step, str(path), len(traced), count, left_out, error_us, round(seconds, 3)))


def _kind(span: Span) -> str:
    return "generations" if span.name == GENERATE else "other requests"
