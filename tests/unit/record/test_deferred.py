"""Work that is put off a little, for others who want it too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from ctpo_megatron.errors import StorageError
from ctpo_megatron.record.deferred import Deferred

SOON_S = 0.02


class Work:
    """Counts how often it is done, or fails."""

    def __init__(self) -> None:
        self.done = self.failed = 0
        self.broken: Exception | None = None

    def __call__(self) -> None:
        if self.broken is not None:
            self.failed += 1
            raise self.broken
        self.done += 1


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


def test_it_is_done_once_for_many_and_anew_for_those_who_come_after() -> None:
    async def scenario() -> None:
        work = Work()
        deferred = Deferred(work, SOON_S)
        for wanted in (1, 2):
            for _ in range(5):
                deferred.want()
            assert work.done == wanted - 1
            await until(lambda: work.done > wanted - 1)  # noqa: B023 - awaited here
        await asyncio.sleep(3 * SOON_S)
        assert work.done == 2

    asyncio.run(scenario())


def test_who_cannot_wait_has_it_now_and_it_is_not_done_a_second_time() -> None:
    async def scenario() -> None:
        work = Work()
        deferred = Deferred(work, SOON_S)
        deferred.want()
        deferred.now()
        assert work.done == 1
        await asyncio.sleep(3 * SOON_S)
        assert work.done == 1
        deferred.want()
        await until(lambda: work.done == 2)

    asyncio.run(scenario())


def test_without_an_event_loop_it_is_done_at_once() -> None:
    work = Work()
    deferred = Deferred(work, 60.0)
    deferred.want()
    deferred.want()
    assert work.done == 2


def test_what_failed_when_nobody_was_there_is_told_to_whoever_comes_next() -> None:
    async def scenario() -> None:
        heard: list[dict] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: heard.append(context))
        work = Work()
        work.broken = StorageError("full")
        deferred = Deferred(work, SOON_S)
        deferred.want()
        await until(lambda: work.failed == 1)
        for ask in (deferred.want, deferred.now, deferred.want):
            with pytest.raises(StorageError, match="full"):
                ask()
        work.broken = None
        deferred.want()
        assert work.done == 1
        deferred.want()
        assert work.done == 1, "it is over, so it may wait again"
        await until(lambda: work.done == 2)
        assert heard == []
        work.broken = ZeroDivisionError()
        deferred.want()
        await until(lambda: bool(heard))  # of no disk: the loop tells it at once
        with pytest.raises(ZeroDivisionError):
            deferred.want()

    asyncio.run(scenario())
