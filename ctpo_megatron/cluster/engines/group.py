"""The inference servers of a run: started together, watched, and started again in their places when they are lost."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from ctpo_megatron.cluster.calls import Process, call_all
from ctpo_megatron.cluster.engines.actor import EngineActor
from ctpo_megatron.cluster.placement import ServerPlacement
from ctpo_megatron.cluster.watch.watchdog import Watchdog, Watched
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.fleet import UP, Fleet, Member
from ctpo_megatron.errors import CtpoError, EngineError, ProcessDied, StartLost

END_TIMEOUT_S = 30.0  # for a lost server's processes to end in order


@dataclass(frozen=True)
class _Server:
    """The actors of one server, one for each of its nodes, and the calls that launched its parts."""

    name: str
    parts: list[Process]
    launched: list[ray.ObjectRef]
    watched: list[Watched]

    async def watch(self) -> None:
        """Raises the most telling error as soon as a part dies: the others die of it, and may be seen first. Returns when all are
        closed."""
        calls = [(part, part.actor.watch.options(concurrency_group="watch").remote()) for part in self.parts]
        await call_all(calls, timeout_s=None)

    async def end(self) -> None:
        """End its processes, in order where an actor still answers within a bounded time."""
        closing = [asyncio.wrap_future(part.actor.close.remote().future()) for part in self.parts]
        try:
            await asyncio.wait(closing, timeout=END_TIMEOUT_S)
        finally:
            for each in closing:
                each.cancel()
            await asyncio.gather(*closing, return_exceptions=True)
            for part in self.parts:
                ray.kill(part.actor)


class EngineGroup:
    """The servers, one for each of `places`. `fleet` is told when one answers and when one is lost.

    `routed_experts`: whether they return which experts they chose for each token. `shared_expert`: whether the model has one.
    `nursery`: the socket of the process that they are forked from; empty: there is none.
    `environment`: Ray's, of their actors. `watchdog`: told of each server's processes from its start to its end. `name`: what a
    server is called, before its number. `log`: the beginning of its log's name. `section`: of the user's configuration, which
    `rollout.engine` of `config` is made from.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        api_key: str,
        places: list[ServerPlacement],
        fleet: Fleet,
        *,
        routed_experts: bool = False,
        shared_expert: bool = False,
        nursery: str = "",
        environment: dict[str, Any] | None = None,
        watchdog: Watchdog | None = None,
        name: str = "inference server",
        log: str = "server",
        section: str = "rollout.engine",
    ) -> None:
        self._watchdog, self._name, self._log, self._section = watchdog, name, log, section
        self._same = (routed_experts, shared_expert, nursery, section)
        self._environment = {"runtime_env": environment} if environment else {}
        self._config = config
        self._run_dir = run_dir
        self._api_key = api_key
        self._places = places
        self._fleet = fleet
        self._servers = [self._launch(index, 0) for index in range(len(places))]
        self._started = asyncio.Event()
        self._tending: asyncio.Future[Any] | None = None  # from `start` on

    async def start(self) -> None:
        """Wait until all servers answer. Raises EngineError or ProcessDied where one does not."""
        urls = await self._urls(self._servers)
        members = [self._join(server, url) for server, url in zip(self._servers, urls, strict=True)]
        self._tending = asyncio.gather(*(self._tend(index, member) for index, member in enumerate(members)))
        self._started.set()

    async def watch(self) -> None:
        """Raises ProcessDied when all servers are lost for good."""
        await self._started.wait()
        if self._tending is not None:
            await asyncio.shield(self._tending)
        raise ProcessDied(f"no {self._name} is left:\n{self._fleet.report()}")

    async def close(self) -> None:
        """End the watch and all servers; `Runtime.close` bounds it."""
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
        await asyncio.gather(*(self._end(server) for server in self._servers))

    async def _tend(self, index: int, member: Member) -> None:
        """Start the server again whenever it is lost; return when it is gone for good."""
        restarts = 0
        while True:
            await self._until_lost(self._servers[index], member)
            while member.state not in UP:
                await self._end(self._servers[index])
                if member.gone:
                    return
                await self._fleet.memory_free()
                restarts += 1
                server = self._servers[index] = self._launch(index, restarts)
                try:
                    (url,) = await self._urls([server])
                except CtpoError as error:
                    self._fleet.lose(member, str(error))
                else:
                    member = self._join(server, url)

    async def _end(self, server: _Server) -> None:
        if self._watchdog is not None:
            self._watchdog.remove(server.watched)
        await server.end()

    async def _until_lost(self, server: _Server, member: Member) -> None:
        """Wait until one of its processes has died, which the fleet is told here, or the fleet has given it up."""
        died = asyncio.ensure_future(server.watch())
        lost = asyncio.ensure_future(self._fleet.lost(member))
        try:
            await asyncio.wait([died, lost], return_when=asyncio.FIRST_COMPLETED)
            if not lost.done():
                self._fleet.lose(member, str(died.exception() or ProcessDied("its actor was closed")))
        finally:
            died.cancel()
            lost.cancel()
            await asyncio.gather(died, lost, return_exceptions=True)

    async def _urls(self, servers: list[_Server]) -> list[str]:
        """The URL of each server, once all its parts are there. Raises the most telling error as soon as one fails."""
        within_s = self._config.cluster.start_timeout_s
        try:
            async with asyncio.timeout(within_s):
                launched = [call for server in servers for call in zip(server.parts, server.launched, strict=True)]
                await call_all(launched, None, StartLost)
                calls = [(part, part.actor.start.remote()) for server in servers for part in server.parts]
                urls = await call_all(calls, None, StartLost)
        except TimeoutError:
            logs = ", ".join(str(part.log_path) for server in servers for part in server.parts)
            raise EngineError(
                f"not all servers came up within cluster.start_timeout_s={within_s:g} s; their logs: {logs}"
            ) from None
        return urls[:: len(servers[0].parts)]  # of the first parts, which answer requests

    def _join(self, server: _Server, url: str) -> Member:
        member = self._fleet.join(server.name, url, self._config.rollout.engine.tp)
        for watched in server.watched:
            watched.hung = functools.partial(self._fleet.lose, member)
        for first in server.watched[:1]:  # the part that answers requests
            first.state = lambda: str(member.state)
        return member

    def _launch(self, index: int, restarts: int) -> _Server:
        """New actors at place `index`. A server that is started again draws other random numbers than before."""
        config, place, name = self._config, self._places[index], f"{self._name} {index}"
        seed = config.seed + index + restarts * len(self._places)
        remote, parts = ray.remote(concurrency_groups={"watch": 1, "pulse": 1})(EngineActor), []
        for rank, options in enumerate(place.parts):
            of_part = f"{self._log}_{index}.log" if rank == 0 else f"{self._log}_{index}_node_{rank}.log"
            log = self._run_dir / "logs" / of_part
            remote_here = remote.options(**options, **self._environment)
            actor = remote_here.remote(config, seed, str(log), self._api_key, place.gpus, *self._same)
            parts.append(Process(name if len(place.parts) == 1 else f"{name}, node {rank}", actor, log))
        head = parts[0].actor.head.remote()
        launched = [part.actor.launch.remote(rank, head, again=restarts > 0) for rank, part in enumerate(parts)]
        watched = [Watched(part, restarts=f"{self._section}.restarts") for part in parts]
        if self._watchdog is not None:
            self._watchdog.add(watched)
        return _Server(name, parts, launched, watched)
