"""A bound on how many pass at a time, which can be moved while they do; first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Lets at most `limit` in; None: everybody. Belongs to one event loop.

    Whoever leaves wakes one that waits, so the work is the same however many wait.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._inside = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Returns how many wait to be let in."""
        return sum(not each.done() for each in self._waiting)

    def set_limit(self, limit: int | None) -> None:
        """Move the bound. Those who are inside stay."""
        self._limit = limit
        self._let_in()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Wait to be let in; inside until the context ends."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._let_in()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._inside -= 1
            else:
                turn.cancel()
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting and (self._limit is None or self._inside < self._limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self._inside += 1
                turn.set_result(None)
