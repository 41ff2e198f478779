"""A paused server leaves its cores to others; SGLang itself would poll for requests without a pause."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from pathlib import Path

import pytest

from ctpo_megatron.engine.processes import group_members
from tests.support.engines import RunningServer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

WATCHED_S = 2.0


def cpu_s(group: int) -> float:
    """CPU seconds of a process group so far."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in group_members(group)]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


async def cpu_while_paused(server: RunningServer) -> float:
    async with server.client() as client:
        await client.control.pause(server.url)
        try:
            await asyncio.sleep(0.5)
            before, begin = cpu_s(server.server.pid), time.monotonic()
            await asyncio.sleep(WATCHED_S)
            share = (cpu_s(server.server.pid) - before) / (time.monotonic() - begin)
            answered = time.monotonic()
            await client.control.open_update(server.url)
            await client.control.close_update(server.url)
            assert time.monotonic() - answered < 1.0, "a request ends its sleep"
        finally:
            await client.control.resume(server.url)
    return share


def test_a_paused_server_sleeps(server: RunningServer) -> None:
    assert asyncio.run(cpu_while_paused(server)) < 0.1


def test_the_hook_is_needed() -> None:
    """When this fails, SGLang sleeps by itself: take engine/sglang/paused.py away."""
    from sglang.srt.managers.scheduler import Scheduler

    loop = inspect.getsource(Scheduler.event_loop_normal)
    paused = loop.partition("if self._engine_paused:")[2].partition("continue")[0]
    assert paused.split() == ["self._record_scheduler_state_for_paused_engine()"]
    recorder = inspect.unwrap(Scheduler._record_scheduler_state_for_paused_engine)
    assert "sleep" not in inspect.getsource(recorder)
