"""The processes of a run: all are started at once, watched while the run goes on, and ended with it.

driver (loop) --+-- TrainerActor x world_size   (Megatron ranks)
                +-- EngineActor x servers  --- SGLang server process group
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ctpo_megatron.cluster.calls import Process, call_all
from ctpo_megatron.cluster.engine_actor import EngineActor
from ctpo_megatron.cluster.ray_cluster import bundles_of, by_node, connect, reserve, resolve_device
from ctpo_megatron.cluster.server import new_api_key
from ctpo_megatron.cluster.trainer_actor import TrainerActor
from ctpo_megatron.cluster.trainer_group import TrainerGroup
from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import ProcessDied

CLOSE_TIMEOUT_S = 30.0


class Runtime:
    """Use as `async with Runtime(config, ...) as runtime`; leaving the block ends every process it started."""

    def __init__(self, config: RunConfig, run_dir: Path, *, trainer: bool, engines: bool, total_steps: int = 0) -> None:
        self.config = config
        self.urls: list[str] = []
        self.api_key = new_api_key()
        self.trainer: TrainerGroup | None = None
        self._run_dir = run_dir
        self._wanted = (trainer, engines)
        self._total_steps = total_steps
        self._engines: list[Process] = []
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
        trainer, engines = self._wanted
        connect(self.config, len(bundles_of(self.config, trainer=trainer, engines=engines)))
        self.config = config = resolve_device(self.config)
        bundles = bundles_of(config, trainer=trainer, engines=engines)
        group = await reserve(bundles, config.cluster.start_timeout_s)
        world = config.parallel.world_size if trainer else 0
        order = [*by_node(group, world), *range(world, len(bundles))]
        for index, bundle in enumerate(order):
            place = {
                "num_cpus": bundles[bundle]["CPU"],
                "num_gpus": bundles[bundle].get("GPU", 0),
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            }
            if index < world:
                self._ranks.append(self._trainer_process(index, place))
            else:
                self._engines.append(self._engine_process(index - world, place))
        self.trainer = TrainerGroup(self._ranks, config.cluster.call_timeout_s) if trainer else None
        await self.guard(self._come_up())

    async def _come_up(self) -> None:
        config, timeout = self.config, self.config.cluster.start_timeout_s
        starts = call_all([(engine, engine.actor.start.remote()) for engine in self._engines], timeout)
        if self.trainer is None:
            self.urls = await starts
            return
        threads = max(1, (os.cpu_count() or 1) // len(self._ranks)) if config.cluster.device == "cpu" else 1
        build = asyncio.wait_for(self.trainer.build(threads, self._total_steps), timeout)
        self.urls, _ = await asyncio.gather(starts, build)

    async def connect_trainer(self) -> None:
        """Join trainer and servers in the group that weights travel through."""
        await self.trainer.connect(self.urls, self.api_key, self.config.rollout.engine.tp)

    def _trainer_process(self, rank: int, place: dict[str, Any]) -> Process:
        log = self._run_dir / "logs" / f"trainer_{rank}.log"
        remote = ray.remote(concurrency_groups={"watch": 1})(TrainerActor)
        actor = remote.options(**place).remote(self.config, rank, str(log))
        return Process(f"trainer rank {rank}", actor, log)

    def _engine_process(self, index: int, place: dict[str, Any]) -> Process:
        log = self._run_dir / "logs" / f"server_{index}.log"
        remote = ray.remote(concurrency_groups={"watch": 1})(EngineActor)
        actor = remote.options(**place).remote(self.config, index, str(log), self.api_key)
        return Process(f"inference server {index}", actor, log)

    async def guard(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work`; if a process dies meanwhile, cancel it and raise that process's error."""
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
        calls = [(p, p.actor.watch.options(concurrency_group="watch").remote()) for p in [*self._ranks, *self._engines]]
        await call_all(calls, timeout_s=None)
        raise ProcessDied("all processes of the run ended before the run did")

    async def close(self) -> None:
        """End what was started, each step bounded; safe to call twice."""
        if not ray.is_initialized():
            return
        ends = [p.actor.close.remote() for p in [*self._engines, *self._ranks]]
        if ends:
            futures = [asyncio.wrap_future(ref.future()) for ref in ends]
            await asyncio.wait(futures, timeout=CLOSE_TIMEOUT_S)
            for future in futures:
                future.cancel()
        for process in [*self._engines, *self._ranks]:
            ray.kill(process.actor)
        self._engines, self._ranks = [], []
        ray.shutdown()
