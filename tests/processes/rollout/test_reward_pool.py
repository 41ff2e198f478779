"""Requests that wait for a judge's process: several at a time for a quick one, and each gets its own answer whatever happens."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

import pytest

from ctpo_megatron.rollout.rewards.pool import Pool
from ctpo_megatron.rollout.rewards.process import Late, Lost, Worker

JUDGE = """
import os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    match line.split():
        case ["exit"]: os._exit(3)
        case ["hang"]: time.sleep(600)
        case ["slow", seconds, *_]: time.sleep(float(seconds))
        case _: seconds = 0.0001
    print(seconds, os.getpid(), line.strip(), flush=True)
"""
QUICK = [str(number) for number in range(100)]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[list[bytes]]:
    """The requests that processes were given together, in order."""
    found: list[list[bytes]] = []
    answers = Worker.answers

    def noted(self: Worker, requests: list[bytes], timeout_s: float) -> object:
        found.append(requests)
        return answers(self, requests, timeout_s)

    monkeypatch.setattr(Worker, "answers", noted)
    return found


def run(ask: Callable[[Pool], Awaitable[None]], *, count: int = 1, timeout_s: float = 30.0) -> None:
    async def opened() -> None:
        command = (sys.executable, "-c", JUDGE)
        pool = Pool(command, "the judge", count=count, start_timeout_s=60.0, timeout_s=timeout_s)
        try:
            await ask(pool)
        finally:
            pool.close()

    asyncio.run(opened())


async def said(pool: Pool, *requests: str) -> list[str | BaseException]:
    """What is answered to each, without the process's number."""
    found = await asyncio.gather(*(pool.ask(request.encode()) for request in requests), return_exceptions=True)
    return [each if isinstance(each, BaseException) else each.split(maxsplit=1)[1].decode().strip() for each in found]


def test_a_quick_one_is_given_many_at_a_time(handed: list[list[bytes]]) -> None:
    async def ask(pool: Pool) -> None:
        assert await said(pool, *QUICK) == QUICK
        before = len(handed)
        assert len(handed[0]) == 1, "nobody knows yet how quick it is"
        assert await said(pool, *QUICK) == QUICK
        assert len(handed) - before == 2

    run(ask)


def test_of_one_that_takes_long_every_process_has_one_at_a_time(handed: list[list[bytes]]) -> None:
    async def ask(pool: Pool) -> None:
        await said(pool, *QUICK)
        await said(pool, "slow 0.02")
        handed.clear()
        requests = [f"slow 0.02 {number}" for number in range(8)]
        assert await said(pool, *requests) == requests
        assert [len(each) for each in handed] == [1] * 8

    run(ask, count=2)


def test_a_batch_is_shared_by_processes_that_are_idle() -> None:
    async def ask(pool: Pool) -> None:
        await said(pool, *QUICK)
        answers = await asyncio.gather(*(pool.ask(request.encode()) for request in QUICK))
        processes = [answer.split()[0] for answer in answers]
        assert len(set(processes)) == 2
        assert 40 <= processes.count(processes[0]) <= 60

    run(ask, count=2)


@pytest.mark.parametrize(("wrong", "timeout_s", "kind"), [("exit", 30.0, Lost), ("hang", 0.5, Late)])
def test_one_that_ends_its_process_takes_none_with_it(
    handed: list[list[bytes]], wrong: str, timeout_s: float, kind: type[Lost]
) -> None:
    async def ask(pool: Pool) -> None:
        await said(pool, *QUICK)
        handed.clear()
        requests = [*QUICK[:10], wrong, *QUICK[10:20], wrong, *QUICK[20:30]]
        found = await said(pool, *requests)
        assert [type(each) for each in found if not isinstance(each, str)] == [kind, kind]
        assert [each if isinstance(each, str) else wrong for each in found] == requests
        assert len(handed[0]) == len(requests), "they were behind it in its process"

    run(ask, timeout_s=timeout_s)


def test_an_answer_that_nobody_waits_for_any_more_is_no_other_ones() -> None:
    async def ask(pool: Pool) -> None:
        await said(pool, *QUICK)
        tasks = [asyncio.ensure_future(said(pool, request)) for request in ("slow 0.2", *QUICK[:20])]
        await asyncio.sleep(0.05)
        for task in tasks[:5]:
            task.cancel()
        assert [await task for task in tasks[5:]] == [[request] for request in QUICK[4:20]]
        assert await said(pool, *QUICK) == QUICK

    run(ask)
