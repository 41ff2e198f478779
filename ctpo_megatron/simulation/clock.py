"""An event loop whose time is virtual: where all tasks wait, it jumps to the next timer instead of sleeping.

It has no selector, no sockets and no threads, so what happens depends on nothing but what the tasks do: the same tasks give the
same times, on every machine. Code that asks its event loop for the time (`loop.time()`, `asyncio.sleep`, `asyncio.timeout`) runs
on it unchanged.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
MOST_SECONDS = 1e9  # a simulated time of thirty years: what is waited for will not come


class NothingLeft(RuntimeError):
    """All tasks wait, and no timer will ever wake one, or none that matters."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An asyncio event loop on a virtual clock that begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._bound = MOST_SECONDS
        self._selector = self  # `BaseEventLoop` asks it to wait until the next timer is due

    def time(self) -> float:
        """Returns the virtual time in seconds."""
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """Jump `timeout` seconds ahead. Raises NothingLeft where there is no timer to jump to, and after MOST_SECONDS."""
        if timeout is None:
            raise NothingLeft("all tasks of the simulation wait for each other; nothing will ever happen again")
        self._now += timeout
        if self._now > self._bound:
            self._bound = math.inf  # the tasks that are cancelled now may take their time
            raise NothingLeft(f"the simulation has come to {MOST_SECONDS:,.0f} s: what it waits for does not come")
        return []

    def _process_events(self, _events: list[Any]) -> None:
        """Do nothing: there are no files to hear of."""

    def _write_to_self(self) -> None:
        """Do nothing: there is no other thread that could wake this one."""


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Returns what `main` returns, run to its end on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
