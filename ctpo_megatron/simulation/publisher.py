"""Publications that only take time, over the real fleet; and servers that die and come back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterable
from random import Random

from ctpo_megatron.engine.fleet import UP, Fleet, Member, State
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.simulation.server import SimulatedServer
from ctpo_megatron.simulation.speeds import Speeds


class SimulatedPublisher:
    """Gives all servers of `fleet` the next version; `servers` by their names."""

    digest = "simulated"

    def __init__(self, fleet: Fleet, servers: dict[str, SimulatedServer], speeds: Speeds, *, sleeping: bool = False) -> None:
        self._fleet, self._servers, self._speeds, self._sleeping = fleet, servers, speeds, sleeping
        self._version = 0

    async def publish(self, version: int) -> dict[str, float]:
        """Returns seconds and counts of servers, after all servers that are up hold `version`.

        Raises WeightSyncError where none is left.
        """
        self._version = version
        self._fleet.awake()
        begun = asyncio.get_running_loop().time()
        await asyncio.sleep(self._speeds.publish_s - self._speeds.paused_s)
        await self._bring_up(self._fleet.publishable(*UP))
        if self._fleet.hopeless:
            raise WeightSyncError(f"version {version} of the weights reached no inference server:\n{self._fleet.report()}")
        seconds = {"publish/total": asyncio.get_running_loop().time() - begun, "publish/paused": self._speeds.paused_s}
        return seconds | self._fleet.metrics()

    async def offload(self) -> None:
        """Let servers sleep that share the trainer's devices; others are left alone."""
        if self._sleeping:
            for member in self._fleet.offload():
                self._servers[member.name].pause()

    async def heal(self) -> None:
        """Give servers that have come back the current version."""
        late = self._fleet.publishable(State.JOINING, State.SUSPENDED)
        if late:
            await self._bring_up(late)

    async def _bring_up(self, members: Iterable[Member]) -> None:
        members = list(members)
        self._fleet.update(members)
        for member in members:
            self._servers[member.name].pause()
        await asyncio.sleep(self._speeds.paused_s)
        proven = [member for member in members if member.state is State.UPDATING]
        self._fleet.serve(proven, self._version)
        for member in proven:
            self._servers[member.name].resume(self._version)


class Failures:
    """Servers die `mtbf_s` after they came up, on average, at times drawn for each, and are up again after `start_s`.

    `mtbf_s` None: none dies.
    """

    def __init__(
        self, fleet: Fleet, servers: dict[str, SimulatedServer], speeds: Speeds, mtbf_s: float | None, seed: int
    ) -> None:
        self._fleet, self._servers, self._start_s = fleet, servers, speeds.start_s
        self._mtbf_s, self._seed = mtbf_s, seed
        self.count = 0

    @contextlib.asynccontextmanager
    async def happening(self) -> AsyncIterator[None]:
        """Let servers die, and start them again, while the context is open."""
        mtbf_s = self._mtbf_s
        lives = [] if mtbf_s is None else [asyncio.ensure_future(self._of(each, mtbf_s)) for each in self._fleet.members(*UP)]
        try:
            yield
        finally:
            for each in lives:
                each.cancel()
            await asyncio.gather(*lives, return_exceptions=True)

    async def _of(self, member: Member, mtbf_s: float) -> None:
        for life in itertools.count():
            await asyncio.sleep(Random(f"{self._seed}/{member.name}/{life}").expovariate(1 / mtbf_s))
            self.count += 1
            self._servers[member.name].fail()
            self._fleet.lose(member, "it died")
            if member.gone:
                return
            await asyncio.sleep(self._start_s)
            member = self._fleet.join(member.name, member.url)
