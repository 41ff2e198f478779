"""The processes of a run: all are started at once, watched while the run goes on, and ended with it.

driver (loop) --+-- TrainerActor x world_size   (Megatron ranks)
                +-- EngineActor x servers  --- SGLang server process group; those of teachers, if there are any, too

Servers that share the trainer's GPUs start when the trainer is built: SGLang sizes its KV cache by the memory that it finds free.
A server that is lost is started again (`engines`); losing all for good ends the run. A trainer that has lost a rank is started
again as a whole by `restart_trainer`: its ranks wait for each other in every collective, and weights are cut over all of them.
What is stopped or hangs is found by `watch`, and then counts as dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray

from ctpo_megatron.cluster.calls import Process, call_all, first_of
from ctpo_megatron.cluster.engines.group import EngineGroup
from ctpo_megatron.cluster.environment import EVALUATION_RECORD, RECORD, decide, ray_environment, write_record
from ctpo_megatron.cluster.placement import Placement, RayOptions, ServerPlacement, share_gpus
from ctpo_megatron.cluster.ray_cluster import connect, resolve_device
from ctpo_megatron.cluster.ray_watch import Part, alive, ended, ray_processes
from ctpo_megatron.cluster.resources import Resources
from ctpo_megatron.cluster.room import Room
from ctpo_megatron.cluster.teachers import TeacherServers, teacher_fleets
from ctpo_megatron.cluster.trainer.actor import TrainerActor
from ctpo_megatron.cluster.trainer.group import TrainerGroup
from ctpo_megatron.cluster.watch.loop_watch import LoopWatch
from ctpo_megatron.cluster.watch.now import look
from ctpo_megatron.cluster.watch.watchdog import Watchdog
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.fleet import Fleet, State
from ctpo_megatron.engine.nursery import Nursery
from ctpo_megatron.engine.server import new_api_key
from ctpo_megatron.environment import Reader
from ctpo_megatron.errors import ProcessDied, RayLost, StartLost, TrainerLost
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.topology import Topology
from ctpo_megatron.record.events import Emit, discard
from ctpo_megatron.record.heartbeat import Depths, Stages
from ctpo_megatron.record.now import NAME as NOW
from ctpo_megatron.record.now import Now, kept_now
from ctpo_megatron.record.run_events import PartLost
from ctpo_megatron.types import RoutingShape

T = TypeVar("T")

CLOSE_TIMEOUT_S = 30.0
DEATH_SHOWS_WITHIN_S = 2.0  # after a call has failed because of it


class Runtime:
    """Use as `async with Runtime(...) as runtime`; leaving the block ends every process it started.

    `shape`: of the model in config.model.path. `topology`: which processes there are. `total_steps`: optimizer steps of the run.
    `emit` receives what happens to the inference servers and to the trainer's places. Once it has started, `config` and
    `topology` name the device that is used, cpu or cuda, and the layout that the trainer has: `parallel`, or a smaller one of
    `elastic.layouts`. `nursery`: the process that servers on CPUs of this host are forked from.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ModelShape,
        topology: Topology,
        run_dir: Path,
        *,
        total_steps: int = 0,
        emit: Emit = discard,
        nursery: Nursery | None = None,
    ) -> None:
        self.config = config = config if topology.ranks else config.without_trainer
        self.shape = shape
        self.topology = topology
        self.fleet = make_fleet(config, trained=topology.ranks > 0, emit=emit)
        self.teachers = teacher_fleets(config, emit) if topology.teachers else {}
        self.api_key = new_api_key()
        self._run_dir = run_dir
        self._trainer: TrainerGroup | None = None
        self._total_steps = total_steps
        self._nursery = nursery
        self._environment: dict[Reader, dict[str, str]] = {"trainer": {}, "server": {}}
        self._engines: EngineGroup | None = None
        self._teacher_servers: TeacherServers | None = None
        self._ranks: list[Process] = []
        self._room: Room | None = None
        self._ray: dict[Part, psutil.Process] = {}
        self.stages, self.depths = Stages(), Depths()  # of the driver
        self._emit = emit
        self._loop_watch = LoopWatch(config.cluster.watch.frozen_s, run_dir, self.stages.now)
        self._watchdog: Watchdog | None = None
        self._resources = Resources(run_dir)
        self._kept_now = contextlib.AsyncExitStack()

    @property
    def trainer(self) -> TrainerGroup:
        """All ranks of the trainer. Raises RuntimeError before they are started, and in a run that has none."""
        if self._trainer is None:
            raise RuntimeError("this run has no trainer: its topology has no ranks, or they are not started yet")
        return self._trainer

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return self._run_dir

    def resources(self) -> dict[str, float]:
        """What the run's processes use now, under the record's names."""
        return self._resources.metrics({} if self._watchdog is None else self._watchdog.memory())

    @property
    def routing(self) -> RoutingShape | None:
        """What the servers' record of chosen experts looks like; None where the trainer does not replay them."""
        return self.shape.routing if self.config.moe.routing_replay else None

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
        self._loop_watch.start()
        await self._kept_now.enter_async_context(kept_now(self._run_dir / NOW, self.now))
        bundles = self.topology.bundles + self.topology.teacher_bundles
        connect(self.config, round(sum(bundle["CPU"] for bundle in bundles)))
        self._ray = ray_processes()
        self.config = config = resolve_device(self.config, self.shape)
        topology = self.topology.on(config.cluster.device)
        topology.check_sharing()
        self._room = room = Room(config, topology, self._emit)
        self._environment = decide(config, os.environ)
        write_record(config, self._environment, self._run_dir / (RECORD if topology.ranks else EVALUATION_RECORD))
        self._watchdog = watchdog = self._begin_watch()
        await room.take()
        self._launch_trainer(room, watchdog)
        servers = room.placement.servers
        if servers and not topology.shares_gpus:
            self._engines = self._engine_group([ServerPlacement(parts) for parts in servers])
        if room.placement.teachers:
            self._teacher_servers = self._launch_teachers(room.placement)
        await self.guard(self._come_up(room.placement))

    def _launch_trainer(self, room: Room, watchdog: Watchdog) -> None:
        self.config, self.topology = self.config.in_layout(room.layout), room.topology
        self._ranks = [self._trainer_process(rank, options) for rank, options in enumerate(room.placement.ranks)]
        self._trainer = TrainerGroup(self._ranks, self.config.cluster.call_timeout_s) if self._ranks else None
        watchdog.watch_ranks(self._ranks)

    async def restart_trainer(self) -> None:
        """End what is left of the trainer's ranks and start all of them again, with the weights that a run begins with.

        Servers are left alone; those that share the trainer's GPUs have to have given back their memory. The ranks come up in
        the places that they had, or in others, and in a layout, that `Room` finds when a node is gone. Ray starts none before
        the one that had its place is gone, also where that one is stopped and hears nothing.
        """
        room, watchdog = self._room, self._watchdog
        assert room is not None, "the runtime is open"
        assert watchdog is not None, "the runtime is open"
        for rank in self._ranks:
            ray.kill(rank.actor)
        self._ranks = []  # nobody waits for their end
        watchdog.watch_ranks([])
        await self.guard(room.retake())
        self._launch_trainer(room, watchdog)
        await self.guard(self._build_trainer(room.placement))

    def _begin_watch(self) -> Watchdog:
        node = ray.get_runtime_context().get_node_id()
        watchdog = Watchdog(
            self.config.cluster.watch,
            node,
            self._run_dir,
            self._emit,
            stages=self.stages,
            depths=self.depths,
            lag=self._loop_watch.lag_s,
        )
        of_ray = {f"Ray's {name}": process.pid for name, process in self._ray.items()}
        watchdog.add_others(of_ray)
        self._loop_watch.end_stopped(of_ray, self.config.cluster.watch.stopped_s)
        watchdog.start()
        return watchdog

    async def _come_up(self, placement: Placement) -> None:
        starts = [] if self._engines is None else [self._engines.start()]
        if self._teacher_servers is not None:
            starts.append(self._teacher_servers.start())
        if self.topology.shares_gpus:
            starts.append(self._come_up_sharing(placement))
        elif self._trainer is not None:
            starts.append(self._build_trainer(placement))
        await asyncio.gather(*starts)

    async def _come_up_sharing(self, placement: Placement) -> None:
        await self._build_trainer(placement)
        gpus = await self.trainer.gpus()
        self._engines = self._engine_group(share_gpus(gpus, placement.servers, self.topology.server_tp))
        await self._engines.start()

    async def _build_trainer(self, placement: Placement) -> None:
        ranks = self.topology.ranks
        here = [ranks] * ranks if self.topology.device == "cpu" else placement.ranks_here  # nodes without GPUs may be one machine
        building = [self.trainer.build(here, self._total_steps)]
        if self._room is not None:
            building.append(self._room.until_lost())
        await asyncio.wait_for(first_of(building), self.config.cluster.start_timeout_s)

    def _engine_group(self, places: list[ServerPlacement]) -> EngineGroup:
        return EngineGroup(
            self.config,
            self._run_dir,
            self.api_key,
            places,
            self.fleet,
            routed_experts=self.routing is not None,
            shared_expert=self.shape.has_shared_expert,
            **self._of_servers(),
        )

    def _launch_teachers(self, placement: Placement) -> TeacherServers:
        places = placement.teachers
        return TeacherServers(self.config, self._run_dir, self.api_key, places, self.teachers, **self._of_servers())

    def _of_servers(self) -> dict[str, Any]:
        """What is the same for all servers of the run."""
        device = self.config.cluster.device
        return {
            "nursery": "" if self._nursery is None or device != "cpu" else str(self._nursery.place),
            "environment": ray_environment(device, self._environment["server"]),
            "watchdog": self._watchdog,
        }

    def _trainer_process(self, rank: int, options: RayOptions) -> Process:
        log = self._run_dir / "logs" / f"trainer_{rank}.log"
        remote = ray.remote(concurrency_groups={"watch": 1, "pulse": 1, "checkpoint": 1, "memory": 1})(TrainerActor)
        device, given = self.config.cluster.device, self._environment["trainer"]
        actor = remote.options(**options, runtime_env=ray_environment(device, given)).remote(
            self.config, self.shape, rank, str(log), given
        )
        return Process(f"trainer rank {rank}", actor, log)

    async def guard(self, work: Coroutine[Any, Any, T], rescue: Callable[[], Awaitable[Any]] | None = None) -> T:
        """Run `work`; if a rank of the trainer dies or hangs meanwhile, or no server is left, cancel it and raise why.

        `rescue` is awaited before `work` is cancelled for a trainer's rank: what does not need it may be kept.
        """
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
            failure = task.exception() if task.done() and not task.cancelled() else None
            if failure is not None and not isinstance(failure, StartLost):
                await asyncio.wait([watch], timeout=DEATH_SHOWS_WITHIN_S)  # was the failure the consequence of a death?
            if watch.done():
                if rescue is not None and isinstance(watch.exception(), TrainerLost | RayLost):
                    await rescue()
                watch.result()
            return await task
        except ProcessDied as error:
            self._emit(PartLost(str(error).splitlines()[0]))  # now: ending what is left takes seconds
            raise
        finally:
            for future in (task, watch):
                future.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)

    async def _watch(self) -> None:
        watches: list[Coroutine[Any, Any, Any]] = [] if self._engines is None else [self._engines.watch()]
        watches += [] if self._teacher_servers is None else self._teacher_servers.watches
        watches.append(self._watch_raylet())
        if self._ranks:
            calls = [(rank, rank.actor.watch.options(concurrency_group="watch").remote()) for rank in self._ranks]
            watches.append(call_all(calls, timeout_s=None, lost=TrainerLost))
        if self._watchdog is not None:
            watches.append(self._watchdog.failed())
        await first_of(watches)
        raise TrainerLost("all ranks of the trainer ended before the run did")

    async def _watch_raylet(self) -> None:
        await ended(self._ray.get("raylet"))
        raise RayLost("Ray's raylet died, and with it the trainer and the servers on this host")

    async def gcs_lost(self) -> None:
        """Return when the GCS of the cluster that the run has started is lost: calls between processes still go on, no new ones
        can be started, and in a minute Ray ends this process."""
        await ended(self._ray.get("gcs_server"))

    def now(self) -> Now:
        """Returns what the run's processes are doing, as far as it is known here."""
        watched = () if self._watchdog is None else self._watchdog.watched
        return look(self.stages, self.depths, self._loop_watch.lag_s(), watched, self.fleet.members(*State))

    async def close(self) -> None:
        """End what was started, each step bounded; safe to call twice."""
        try:
            await self._kept_now.aclose()
            await self._close()
        finally:
            self._loop_watch.close()  # a driver that is killed while it closes leaves nothing either

    async def _close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        if not ray.is_initialized():
            return
        if all(alive(process) for process in self._ray.values()):
            await self._end_actors()
        self._engines, self._teacher_servers, self._ranks = None, None, []
        with contextlib.suppress(TimeoutError):  # without its GCS Ray may wait for it; whoever started the command ends the rest
            await asyncio.wait_for(asyncio.to_thread(ray.shutdown), CLOSE_TIMEOUT_S)

    async def _end_actors(self) -> None:
        ends: list[asyncio.Future] = [asyncio.wrap_future(rank.actor.close.remote().future()) for rank in self._ranks]
        if self._engines is not None:
            ends.append(asyncio.ensure_future(self._engines.close()))
        if self._teacher_servers is not None:
            ends.append(asyncio.ensure_future(self._teacher_servers.close()))
        if ends:
            await asyncio.wait(ends, timeout=CLOSE_TIMEOUT_S)
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
        for rank in self._ranks:
            ray.kill(rank.actor)


def make_fleet(config: RunConfig, *, trained: bool, emit: Emit) -> Fleet:
    """The servers of a run. Requests wait as long as what may keep one from serving."""
    return Fleet(
        patience_s=config.absence_s(trained=trained),
        restarts=config.rollout.engine.restarts,
        fixed_version=None if trained else 0,
        emit=emit,
    )
