"""The way of one generation over the servers: which one it asks, how long it stays there, and when it goes on elsewhere.

    acquire a server --> ask it --> its answer, whole or a part --> ask again for the rest, there or elsewhere
        |                  |
        |                  +-- slower than the others: asked for what it has, and left
        +-- the deadline comes while it waits, with tokens in hand: it ends

How a server is asked is the caller's: over HTTP (`engine.client`), or on a virtual clock (`simulation.engine`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from ctpo_megatron.engine.fleet import Fleet, Lease, Member
from ctpo_megatron.engine.traffic import Traffic
from ctpo_megatron.errors import EngineError

MAX_FAILURES = 20  # of servers, at one generation

Answer = TypeVar("Answer")
Send = Callable[[Lease, int, float | None], Awaitable[Answer | None]]
"""Asks a server for at most so many tokens, and after so many seconds (None: never) for what it has by then.

Returns None where there is no answer that can be used.
"""


class Dispatch:
    """The requests of one generation of `session`. `aside`: they go to servers that are set aside.

    `deadline`, on the clock of the event loop: no new request begins after it, but for one token where there is none yet.
    """

    def __init__(
        self, fleet: Fleet, traffic: Traffic, session: int, *, aside: bool = False, deadline: float | None = None
    ) -> None:
        self._fleet, self._traffic = fleet, traffic
        self._session, self._aside, self._deadline = session, aside, deadline
        self._clock = asyncio.get_running_loop().time
        self._moves = traffic.moves  # so often it may still leave a slow server
        self._left: Member | None = None  # the slow server that it comes from
        self._failures = 0

    @property
    def late(self) -> bool:
        """Returns whether the deadline is over."""
        return self._deadline is not None and self._clock() >= self._deadline

    async def ask(
        self, send: Send[Answer], tokens: int, size: Callable[[Answer], int], *, begun: bool
    ) -> tuple[Lease, Answer | None] | None:
        """Ask one server for at most `tokens`; returns which, and what `send` returned. `size`: tokens in an answer.

        `begun`: whether there are tokens already. Then the deadline holds while a server is waited for, too; returns None where
        it came by then. Otherwise one token is asked for in the end.
        """
        limit = asyncio.timeout_at(self._deadline if begun else None)
        try:
            async with limit, self.leased() as lease:
                limit.reschedule(None)
                most = 1 if self.late else tokens
                leave_after_s = self._traffic.leave_after_s(lease.member, most) if self._moves else None
                asked = self._clock()
                answer = await send(lease, most, self._limit_s(leave_after_s))
        except TimeoutError:
            if not limit.expired():
                raise
            return None
        seconds = self._clock() - asked
        if answer is not None and self._traffic.pace is not None:
            self._traffic.pace.answered(lease.member.name, size(answer), seconds)
        if leave_after_s is not None and seconds >= leave_after_s and not lease.broken and not self.late:
            self._leave(lease.member)
        return lease, answer

    @contextlib.asynccontextmanager
    async def leased(self) -> AsyncIterator[Lease]:
        """Yields the server for one request, which counts there while the context is open."""
        async with self._traffic.passing(aside=self._aside):
            lease = await self._fleet.acquire(self._session, self._left, aside=self._aside)
            try:
                yield lease
            finally:
                self._fleet.done(lease)

    def failed(self, url: str) -> None:
        """Count a request of which nothing can be used. Raises EngineError after MAX_FAILURES of them."""
        self._failures += 1
        if self._failures == MAX_FAILURES:
            raise EngineError(f"{MAX_FAILURES} attempts at one generation failed, the last one on {url}")

    def _limit_s(self, leave_after_s: float | None) -> float | None:
        """Returns seconds until a server is asked for what it has; None: no bound. What is late already has no deadline."""
        now = self._clock()
        left_s = None if self._deadline is None or now >= self._deadline else self._deadline - now
        return min((each for each in (left_s, leave_after_s) if each is not None), default=None)

    def _leave(self, member: Member) -> None:
        self._moves -= 1
        self._left = member
        self._traffic.moved()
