"""Generation by simulated servers behind the real `Fleet`, `Traffic` and `Dispatch`: `engine.client` without HTTP and tokens."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from ctpo_megatron.engine.dispatch import Dispatch
from ctpo_megatron.engine.fleet import Fleet, Lease
from ctpo_megatron.engine.load import Load
from ctpo_megatron.engine.traffic import Traffic
from ctpo_megatron.simulation.players import Book, words_of
from ctpo_megatron.simulation.server import Part, Request, SimulatedServer
from ctpo_megatron.simulation.tokens import Spans, Written, as_list
from ctpo_megatron.types import Generation


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
        playing = self._book[session]
        dispatch = Dispatch(self._fleet, self._traffic, session, deadline=deadline)
        wanted = min(playing.said.tokens, max_new_tokens)
        spans: list[tuple[int, int]] = list(getattr(done.versions, "spans", []))
        sampled = len(done.token_ids)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            while sampled < wanted and not (dispatch.late and sampled):
                send = partial(self._answer, session, len(input_ids) + sampled, not playing.last)
                asked = await dispatch.ask(send, wanted - sampled, _sampled, begun=sampled > 0)
                if asked is None:  # it waited for a server until its deadline
                    continue
                lease, part = asked
                if part is None or not await self._fleet.accept(lease, [version for version, _ in part.spans]):
                    dispatch.failed(lease.member.url)
                    continue
                sampled += part.tokens
                spans += part.spans
                done.token_ids, done.versions = as_list(Written(sampled)), as_list(Spans(spans))
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

    async def _answer(
        self, session: int, held: int, again: bool, lease: Lease, tokens: int, limit_s: float | None
    ) -> Part | None:
        """What the server gives, of at most `tokens`; None where it failed. See `dispatch.Send`."""
        loop, server = asyncio.get_running_loop(), self._servers[lease.member.name]
        request = Request(session, held, tokens, again, loop.create_future())
        timer = None if limit_s is None else loop.call_later(limit_s, server.leave, request)
        try:
            server.add(request)
            return await request.answer
        finally:
            if timer is not None:
                timer.cancel()
            server.drop(request)


def _sampled(part: Part) -> int:
    return part.tokens
