"""The virtual clock: time jumps, in order, and a wait without end is an error."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.simulation.clock import NothingLeft, run_virtually


@given(st.lists(st.floats(0, 1e6), max_size=20))
def test_sleepers_wake_in_the_order_of_their_times_and_at_them(delays: list[float]) -> None:
    async def main() -> list[tuple[float, float]]:
        woken: list[tuple[float, float]] = []

        async def sleep(delay: float) -> None:
            await asyncio.sleep(delay)
            woken.append((delay, asyncio.get_running_loop().time()))

        await asyncio.gather(*map(sleep, delays))
        return woken

    woken = run_virtually(main())
    assert [delay for delay, _ in woken] == sorted(delays)
    assert all(now == pytest.approx(delay, abs=1e-8) for delay, now in woken)


def test_a_day_takes_no_time_and_timeouts_are_virtual_too() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(86_400):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    begun = time.monotonic()
    assert run_virtually(main()) == pytest.approx(86_400)
    assert time.monotonic() - begun < 5


def test_tasks_that_wait_for_each_other_are_told_and_not_waited_for() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(NothingLeft, match="wait for each other"):
        run_virtually(main())
