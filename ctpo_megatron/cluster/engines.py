"""The inference servers of a run: started together, watched, and started again in their places when they are lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import ray

from ctpo_megatron.cluster.calls import Process, call_all, explain
from ctpo_megatron.cluster.engine_actor import EngineActor
from ctpo_megatron.cluster.placement import ServerPlace
from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import CtpoError, ProcessDied
from ctpo_megatron.rollout.pool import UP, Member, ServerPool

END_TIMEOUT_S = 30.0  # for a lost server's processes to end in order


class EngineGroup:
    """One EngineActor for each of `places`. `pool` learns what becomes of them."""

    def __init__(self, config: RunConfig, run_dir: Path, api_key: str, places: list[ServerPlace], pool: ServerPool) -> None:
        self._config = config
        self._run_dir = run_dir
        self._api_key = api_key
        self._places = places
        self._pool = pool
        self._processes = [self._launch(index, 0) for index in range(len(places))]
        self._started = asyncio.Event()
        self._tending: asyncio.Future | None = None

    async def start(self) -> None:
        """Until all answer. Raises EngineError or ProcessDied where one does not."""
        calls = [(process, process.actor.start.remote()) for process in self._processes]
        urls = await call_all(calls, self._config.cluster.start_timeout_s)
        members = [self._join(process, url) for process, url in zip(self._processes, urls, strict=True)]
        self._tending = asyncio.gather(*(self._tend(index, member) for index, member in enumerate(members)))
        self._started.set()

    async def watch(self) -> None:
        """Raises ProcessDied when all servers are lost for good."""
        await self._started.wait()
        await asyncio.shield(self._tending)
        raise ProcessDied(f"no inference server is left:\n{self._pool.report()}")

    async def close(self) -> None:
        """Watch no longer and end all servers; `Runtime.close` bounds it."""
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
        await asyncio.gather(*(self._end(process) for process in self._processes))

    async def _tend(self, index: int, member: Member) -> None:
        """Start the server again whenever it is lost; returns when that has been done often enough."""
        restarts = 0
        while True:
            await self._until_lost(self._processes[index], member)
            while member.state not in UP:
                await self._end(self._processes[index])
                if member.gone:
                    return
                await self._pool.room()
                restarts += 1
                process = self._processes[index] = self._launch(index, restarts)
                try:
                    (url,) = await call_all([(process, process.actor.start.remote())], self._config.cluster.start_timeout_s)
                except CtpoError as error:
                    self._pool.lose(member, str(error))
                else:
                    member = self._join(process, url)

    async def _until_lost(self, process: Process, member: Member) -> None:
        """Its process has died, which the pool learns from here, or the pool has given it up."""
        died = asyncio.wrap_future(process.actor.watch.options(concurrency_group="watch").remote().future())
        lost = asyncio.ensure_future(self._pool.lost(member))
        try:
            await asyncio.wait([died, lost], return_when=asyncio.FIRST_COMPLETED)
            if not lost.done():
                error = died.exception() or ProcessDied("its actor was closed")
                self._pool.lose(member, str(explain(process, error)))
        finally:
            died.cancel()
            lost.cancel()

    def _join(self, process: Process, url: str) -> Member:
        return self._pool.join(process.name, url, self._config.rollout.engine.tp)

    def _launch(self, index: int, restarts: int) -> Process:
        """A new actor in its place. A server that is started again draws other random numbers than before."""
        config, log, place = self._config, self._run_dir / "logs" / f"server_{index}.log", self._places[index]
        seed = config.seed + index + restarts * len(self._places)
        remote = ray.remote(concurrency_groups={"watch": 1})(EngineActor)
        actor = remote.options(**place.options).remote(config, seed, str(log), self._api_key, place.gpus)
        return Process(f"inference server {index}", actor, log)

    async def _end(self, process: Process) -> None:
        """End its processes, in order where the actor still answers within a bounded time."""
        closing = asyncio.wrap_future(process.actor.close.remote().future())
        try:
            await asyncio.wait([closing], timeout=END_TIMEOUT_S)
        finally:
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
            ray.kill(process.actor)
