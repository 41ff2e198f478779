"""What flows to the servers: bounded by what they say they can take, and led away from one that falls behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Protocol

from ctpo_megatron.config.traffic import TrafficConfig
from ctpo_megatron.engine.fleet import Fleet, Member, State
from ctpo_megatron.engine.gate import Gate
from ctpo_megatron.engine.load import START, Load, LoadsSeen, next_limit
from ctpo_megatron.engine.pace import Pace
from ctpo_megatron.errors import EngineError

LOOK_TIMEOUT_S = 5.0  # for a server to say how busy it is; one that does not keeps its bound
SELDOM_S = 15.0  # between two looks where no bound follows from them, only metrics


class Loads(Protocol):
    """Tells how busy servers are: `engine.control.ServerControl`."""

    async def load(self, url: str, *, timeout_s: float | None = None) -> Load:
        """Returns the load of the server at `url`. Raises EngineError."""
        ...


class Traffic:
    """Looks at the servers of `fleet`, and sets how many requests each may have.

    `most`: how many one server may ever have at a time. Servers that are set aside are a pool of their own, with its own gate.
    """

    def __init__(self, config: TrafficConfig, fleet: Fleet, control: Loads, *, most: int) -> None:
        self._config, self._fleet, self._control, self._most = config, fleet, control, most
        moving = config.moving
        self.pace = None if moving is None else Pace(moving.factor, moving.least_s)
        self.moves = 0 if moving is None else moving.most  # of one generation
        self._gates = {aside: Gate() for aside in (False, True)}
        self._moved = 0
        self._versions: dict[str, int | None] = {}  # that each server had at the last look
        self._passed_over: set[str] = set()  # servers whose last look moved no bound
        self._seen: dict[str, float] = {}  # the most since `metrics` was asked last
        self._each = LoadsSeen()

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Look while the context is open."""
        tasks = [asyncio.create_task(each, name="traffic") for each in (self._look_on(), self._follow())]
        self._fleet.traffic = self.metrics
        try:
            yield
        finally:
            self._fleet.traffic = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def passing(self, *, aside: bool = False) -> contextlib.AbstractAsyncContextManager[None]:
        """Returns the context of one request. `aside`: for the servers that are set aside."""
        self._bound()
        return self._gates[aside].passing()

    def leave_after_s(self, member: Member, tokens: int) -> float | None:
        """Returns how long a request for at most `tokens` may stay at `member`; None: as long as it takes."""
        if self.pace is None:
            return None
        others = [each.name for each in self._fleet.members(State.SERVING) if each.aside == member.aside]
        return self.pace.leave_after_s(member.name, tokens, others)

    def moved(self) -> None:
        """Count a request that left a slow server."""
        self._moved += 1

    def metrics(self) -> dict[str, float]:
        """Returns what was seen since it was asked last, and how many requests left slow servers since the command began."""
        limits = [member.limit for member in self._fleet.members(State.SERVING) if member.limit is not None]
        found = {f"servers/{name}": value for name, value in self._seen.items()} | {"servers/moved": float(self._moved)}
        self._seen = {}
        found |= self._each.metrics()
        return found | ({"servers/limit": float(sum(limits))} if limits else {})

    async def look(self) -> None:
        """Ask all servers that serve once, and set their bounds."""
        members = self._fleet.members(State.SERVING)
        versions = [member.version for member in members]
        loads = await asyncio.gather(*(self._load(member) for member in members))
        for member, version, load in zip(members, versions, loads, strict=True):
            if load is not None:
                member.load = load
                for name in ("waiting", "retracted", "cache_use"):
                    self._seen[name] = max(self._seen.get(name, 0.0), float(getattr(load, name)))
                self._each.saw(member.name, load)
                if self._config.per_server == "auto" and self._settled(member, version):
                    member.limit = next_limit(member.limit, member.in_flight, load, self._most)
        self._bound()
        self._fleet.freed()

    def _settled(self, member: Member, version: int | None) -> bool:
        """Returns whether a server, asked with `version`, has had it since the last look: what queues else was taken back.

        Of two looks one counts, however fast versions follow one another.
        """
        known = self._versions.get(member.name, version)
        self._versions[member.name] = version
        settled = known == version == member.version or member.name in self._passed_over
        (self._passed_over.discard if settled else self._passed_over.add)(member.name)
        return settled

    def _bound(self) -> None:
        """Give new servers their first bound, and each gate the sum of those of its pool that serve.

        While none does, as in a publication, all count that may serve again: what was let in without a bound would wait for a
        server all at once. A pool of which nothing is left has no bound, so that its requests come to hear of that.
        """
        first = self._config.per_server
        if first is None:
            return
        for aside, gate in self._gates.items():
            pool = [each for each in self._fleet.members(*State) if each.aside == aside and not each.gone]
            for member in pool:
                if member.limit is None:
                    member.limit = min(START, self._most) if first == "auto" else first
            serving = [each for each in pool if each.state is State.SERVING] or pool
            gate.set_limit(sum(each.limit for each in serving if each.limit is not None) or None)

    async def _load(self, member: Member) -> Load | None:
        try:
            return await self._control.load(member.url, timeout_s=LOOK_TIMEOUT_S)
        except EngineError:  # whether it lives is for its watch to find out
            return None

    async def _follow(self) -> None:
        """Let bounds follow servers that come and go at once."""
        while True:
            await self._fleet.changed()
            self._bound()

    async def _look_on(self) -> None:
        pause_s = self._config.look_s if self._config.per_server == "auto" else max(self._config.look_s, SELDOM_S)
        while True:
            await self.look()
            await asyncio.sleep(pause_s)
