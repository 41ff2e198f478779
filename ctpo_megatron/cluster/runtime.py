"""The processes of a run: all are started at once, watched while the run goes on, and ended with it.

driver (loop) --+-- TrainerActor x world_size   (Megatron ranks)
                +-- EngineActor x servers  --- SGLang server process group

Servers that share the trainer's GPUs start when the trainer is built: SGLang sizes its KV cache by the memory that it finds free.
The death of a trainer's rank ends the run. A server that is lost is started again (`engines`); losing all for good ends the run.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import ray

from ctpo_megatron.cluster.calls import Process, call_all
from ctpo_megatron.cluster.engines.group import EngineGroup
from ctpo_megatron.cluster.placement import (
    Places,
    RayOptions,
    ServerPlace,
    bundles_of,
    check_shared,
    place,
    share_gpus,
    shares_gpus,
)
from ctpo_megatron.cluster.ray_cluster import connect, reserve, resolve_device
from ctpo_megatron.cluster.trainer.actor import TrainerActor
from ctpo_megatron.cluster.trainer.group import TrainerGroup
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.engine.server import new_api_key
from ctpo_megatron.errors import ProcessDied
from ctpo_megatron.record.events import Emit, discard

CLOSE_TIMEOUT_S = 30.0


class Runtime:
    """Use as `async with Runtime(config, ...) as runtime`; leaving the block ends every process it started.

    `emit` receives what happens to the inference servers.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        *,
        trainer: bool,
        engines: bool,
        total_steps: int = 0,
        emit: Emit = discard,
    ) -> None:
        self.config = config
        self.fleet = make_fleet(config, trained=trainer, emit=emit)
        self.api_key = new_api_key()
        self.trainer: TrainerGroup | None = None
        self._run_dir = run_dir
        self._wanted = {"trainer": trainer, "engines": engines}
        self._total_steps = total_steps
        self._engines: EngineGroup | None = None
        self._ranks: list[Process] = []

    async def __aenter__(self) -> Runtime:
        try:
            await self._start()
        except BaseException:
            await asyncio.shield(self.close())
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.shield(self.close())

    async def _start(self) -> None:
        wanted = self._wanted
        connect(self.config, round(sum(bundle["CPU"] for bundle in bundles_of(self.config, **wanted))))
        self.config = config = resolve_device(self.config)
        shared = shares_gpus(config, **wanted)
        if shared:
            check_shared(config)
        group = await reserve(bundles_of(config, **wanted), config.cluster.start_timeout_s)
        places = place(config, group, **wanted)
        self._ranks = [self._trainer_process(rank, options) for rank, options in enumerate(places.ranks)]
        self.trainer = TrainerGroup(self._ranks, config.cluster.call_timeout_s) if self._ranks else None
        if places.servers and not shared:
            self._engines = self._engine_group([ServerPlace(parts) for parts in places.servers])
        await self.guard(self._come_up_sharing(places) if shared else self._come_up())

    async def _come_up(self) -> None:
        starts = [] if self._engines is None else [self._engines.start()]
        if self.trainer is not None:
            starts.append(self._build_trainer())
        await asyncio.gather(*starts)

    async def _come_up_sharing(self, places: Places) -> None:
        await self._build_trainer()
        gpus = await self.trainer.gpus()
        self._engines = self._engine_group(share_gpus(gpus, places.servers, self.config.rollout.engine.tp))
        await self._engines.start()

    async def _build_trainer(self) -> None:
        cluster = self.config.cluster
        threads = max(1, (os.cpu_count() or 1) // len(self._ranks)) if cluster.device == "cpu" else 1
        await asyncio.wait_for(self.trainer.build(threads, self._total_steps), cluster.start_timeout_s)

    def _engine_group(self, places: list[ServerPlace]) -> EngineGroup:
        return EngineGroup(self.config, self._run_dir, self.api_key, places, self.fleet)

    def _trainer_process(self, rank: int, options: RayOptions) -> Process:
        log = self._run_dir / "logs" / f"trainer_{rank}.log"
        remote = ray.remote(concurrency_groups={"watch": 1, "checkpoint": 1})(TrainerActor)
        actor = remote.options(**options).remote(self.config, rank, str(log))
        return Process(f"trainer rank {rank}", actor, log)

    async def guard(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work`; if a rank of the trainer dies meanwhile, or the last server, cancel it and raise that process's error."""
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled() and task.exception() is not None and not watch.done():
                await asyncio.wait([watch], timeout=2.0)  # was the failure the consequence of a death?
            if watch.done():
                watch.result()
            return await task
        finally:
            for future in (task, watch):
                future.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)

    async def _watch(self) -> None:
        watches = [] if self._engines is None else [self._engines.watch()]
        if self._ranks:
            calls = [(rank, rank.actor.watch.options(concurrency_group="watch").remote()) for rank in self._ranks]
            watches.append(call_all(calls, timeout_s=None))
        watching = [asyncio.ensure_future(watch) for watch in watches]
        try:
            done, _ = await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        finally:
            for watch in watching:
                watch.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
        raise ProcessDied("all ranks of the trainer ended before the run did")

    async def close(self) -> None:
        """End what was started, each step bounded; safe to call twice."""
        if not ray.is_initialized():
            return
        ends: list[asyncio.Future] = [asyncio.wrap_future(rank.actor.close.remote().future()) for rank in self._ranks]
        if self._engines is not None:
            ends.append(asyncio.ensure_future(self._engines.close()))
        if ends:
            await asyncio.wait(ends, timeout=CLOSE_TIMEOUT_S)
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
        for rank in self._ranks:
            ray.kill(rank.actor)
        self._engines, self._ranks = None, []
        ray.shutdown()


def make_fleet(config: RunConfig, *, trained: bool, emit: Emit) -> Fleet:
    """The servers of a run. Requests wait as long as what may keep one from serving: a start, an update, a training step."""
    engine, cluster = config.rollout.engine, config.cluster
    return Fleet(
        patience_s=engine.start_timeout_s + config.weights.timeout_s + (cluster.call_timeout_s if trained else 0.0),
        restarts=engine.restarts,
        fixed_version=None if trained else 0,
        emit=emit,
    )
