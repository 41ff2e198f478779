"""Generation by simulated servers behind the real `Fleet` and `Traffic`: what `engine.client` does, without HTTP and tokens."""

from __future__ import annotations

import asyncio
from typing import Any

from ctpo_megatron.engine.fleet import Fleet, Lease, Member
from ctpo_megatron.engine.load import Load
from ctpo_megatron.engine.traffic import Traffic
from ctpo_megatron.errors import EngineError
from ctpo_megatron.simulation.players import Book, words_of
from ctpo_megatron.simulation.server import Part, Request, SimulatedServer
from ctpo_megatron.simulation.tokens import Spans, Written, as_list
from ctpo_megatron.types import Generation

MAX_FAILURES = 20  # of servers, at one generation; as `engine.client` has it


class ServerLoads:
    """Tells how busy servers are, by their names."""

    def __init__(self, servers: dict[str, SimulatedServer]) -> None:
        self._servers = servers

    async def load(self, url: str, *, timeout_s: float | None = None) -> Load:
        """Returns the load of the server at `url`, which is its name."""
        return self._servers[url].load()


class SimulatedEngine:
    """All servers of a simulated run behind one object."""

    def __init__(self, fleet: Fleet, traffic: Traffic, servers: dict[str, SimulatedServer], book: Book) -> None:
        self._fleet, self._traffic, self._servers, self._book = fleet, traffic, servers, book
        self.in_flight = self.most_in_flight = 0

    async def generate(
        self,
        input_ids: list[int],
        done: Generation,
        *,
        max_new_tokens: int,
        session: int,
        deadline: float | None = None,
        **_more: Any,
    ) -> Generation:
        """Returns `done`, sampled to the end of its turn; see `EngineClient.generate`."""
        playing, loop = self._book[session], asyncio.get_running_loop()
        wanted = min(playing.said.tokens, max_new_tokens)
        spans: list[tuple[int, int]] = list(getattr(done.versions, "spans", []))
        sampled, moves, left, failures = len(done.token_ids), self._traffic.moves, None, 0
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            while sampled < wanted:
                late = deadline is not None and loop.time() >= deadline
                if late and sampled:
                    break
                ask = 1 if late else wanted - sampled
                until = None if late else deadline
                lease, part, slow = await self._ask(
                    session, len(input_ids) + sampled, ask, not playing.last, left, moves > 0, until
                )
                if part is None or not await self._fleet.accept(lease, [version for version, _ in part.spans]):
                    failures += 1
                    if failures == MAX_FAILURES:
                        raise EngineError(f"{MAX_FAILURES} attempts at one generation failed")
                    continue
                sampled += part.tokens
                spans += part.spans
                done.token_ids, done.versions = as_list(Written(sampled)), as_list(Spans(spans))
                if slow:
                    moves, left = moves - 1, lease.member
                    self._traffic.moved()
        finally:
            self.in_flight -= 1
        return self._whole(session, done, sampled, max_new_tokens, spans)

    def _whole(self, session: int, done: Generation, sampled: int, most: int, spans: list[tuple[int, int]]) -> Generation:
        playing = self._book[session]
        ended = sampled == playing.said.tokens
        done.finish = "stop" if ended else "length" if sampled == most else "deadline"
        done.token_ids = as_list(Written(sampled, ended=ended, text=words_of(session, playing) if ended else ""))
        done.rollout_logp, done.versions = as_list(Written(sampled)), as_list(Spans(spans))
        playing.turn += 1
        return done

    async def _ask(
        self, session: int, held: int, wanted: int, again: bool, left: Member | None, moves: bool, deadline: float | None
    ) -> tuple[Lease, Part | None, bool]:
        """Ask one server; returns which, what it gave, None where it failed, and whether the request leaves it as a slow one."""
        loop = asyncio.get_running_loop()
        async with self._traffic.passing():
            lease = await self._fleet.acquire(session, left)
            server = self._servers[lease.member.name]
            request = Request(session, held, wanted, again, loop.create_future())
            patience_s = self._traffic.leave_after_s(lease.member, wanted) if moves else None
            begun = loop.time()
            limits = [] if patience_s is None else [begun + patience_s]
            limits += [] if deadline is None else [max(deadline, begun)]
            timer = loop.call_at(min(limits), server.leave, request) if limits else None
            try:
                server.add(request)
                part = await request.answer
            finally:
                if timer is not None:
                    timer.cancel()
                server.drop(request)
                self._fleet.done(lease)
        seconds = loop.time() - begun
        if part is not None and self._traffic.pace is not None:
            self._traffic.pace.answered(lease.member.name, part.tokens, seconds)
        slow = part is not None and part.tokens < wanted and patience_s is not None and seconds >= patience_s
        return lease, part, slow
