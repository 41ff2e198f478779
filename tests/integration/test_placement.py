"""Where Ray puts the processes of a colocated run, and which GPUs its servers see: real actors on GPUs that are only declared."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctpo_megatron.cluster.calls import Process
from ctpo_megatron.cluster.engines.group import EngineGroup
from ctpo_megatron.cluster.environment import decide, ray_environment
from ctpo_megatron.cluster.keepers.calls import PIECE, Handed, hand_over, reader
from ctpo_megatron.cluster.keepers.group import Keepers
from ctpo_megatron.cluster.placement import place, share_gpus
from ctpo_megatron.cluster.ray_cluster import reserve
from ctpo_megatron.cluster.trainer.actor import TrainerActor
from ctpo_megatron.cluster.trainer.group import TrainerGroup
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.errors import CopyLost, InputError
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.models.config import read_hf_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

GPUS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes that say they have GPUs; nothing here touches one."""
    node = {"num_cpus": 2 * GPUS, "num_gpus": GPUS, "object_store_memory": 2**27, "include_dashboard": False}
    few = {"prestart_worker_first_driver": False}  # not a worker for each CPU
    nodes = Cluster(initialize_head=True, head_node_args=node | {"_system_config": few})
    try:
        nodes.add_node(**node)
        ray.init(address=nodes.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        nodes.shutdown()


def config(model: Path, *, servers: int, tp: int, dp: int = GPUS, kind: str = "colocated") -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "placement",
            "run_dir": "unused",
            "model": {"path": str(model)},
            "data": {"train": "unused"},
            "parallel": {"dp": dp},
            "rollout": {"engine": {"servers": servers, "tp": tp}},
            "weights": {"type": kind},
            "cluster": {"device": "cuda"},
        }
    )


class Visible:
    """An actor that says which GPUs CUDA would show to it, and which Ray gave to it."""

    def devices(self) -> tuple[str | None, list[str]]:
        return os.environ.get("CUDA_VISIBLE_DEVICES"), ray.get_runtime_context().get_accelerator_ids()["GPU"]


def running_servers() -> set[psutil.Process]:
    """The main processes of all servers below this process, those of other tests too."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ctpo_megatron.engine.sglang.entry" in process.cmdline():
                found.add(process)
    return found


def started_servers(count: int, before: set[psutil.Process]) -> dict[str, tuple[list[str], str]]:
    """Command lines and CUDA_VISIBLE_DEVICES of that many servers, which Ray's actors have just begun to start, by their seeds.

    A server that finds no GPU ends by itself, so two of them are perhaps never there at the same time.
    """
    deadline, found = time.monotonic() + 120, dict[str, tuple[list[str], str]]()
    while len(found) < count and time.monotonic() < deadline:
        for server in running_servers() - before:
            with contextlib.suppress(psutil.Error):
                words = server.cmdline()
                found[words[words.index("--random-seed") + 1]] = words, server.environ()["CUDA_VISIBLE_DEVICES"]
        time.sleep(0.05)
    if len(found) < count:
        raise AssertionError(f"{count} servers were to be started; seeds of those that were: {sorted(found)}")
    return found


@pytest.mark.long
def test_servers_share_the_trainers_gpus(cluster: None, qwen3: Path, tmp_path: Path) -> None:
    """A rank for each GPU; each server beside the first of its ranks, seeing their GPUs first, and the others after them."""

    async def scenario() -> None:
        run, shape = config(qwen3, servers=2, tp=2), read_hf_config(qwen3)
        topology = topology_of(run)
        group = await reserve(topology.bundles, 60)
        placement = place(topology, group)
        assert placement.ranks_here == [GPUS] * GPUS
        remote = ray.remote(TrainerActor)
        logs = [str(tmp_path / f"{rank}.log") for rank in range(GPUS)]
        ranks = [remote.options(**each).remote(run, shape, rank, logs[rank], {}) for rank, each in enumerate(placement.ranks)]
        gpus = await asyncio.gather(*(asyncio.wrap_future(rank.gpus.remote().future()) for rank in ranks))
        assert sorted(gpu for mine in gpus for gpu in mine) == [str(gpu) for gpu in range(GPUS)]
        assert all(len(mine) == 1 for mine in gpus)
        shared = share_gpus(gpus, placement.servers, run.rollout.engine.tp)
        before = running_servers()
        engines = EngineGroup(run, tmp_path, "key", shared, Fleet(patience_s=1))
        try:
            seen = started_servers(2, before)  # by seed, which numbers the servers
            assert all("--enable-memory-saver" in words for words, _ in seen.values())
            (a,), (b,), (c,), (d,) = gpus
            assert {seed: visible.split(",") for seed, (_, visible) in seen.items()} == {"1": [a, b, c, d], "2": [c, d, a, b]}
            taken = ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0)
            assert taken == GPUS, "servers took none of their own"
        finally:
            await engines.close()
            for rank in ranks:
                ray.kill(rank)
            remove_placement_group(group)

    asyncio.run(scenario())


def test_a_colocated_run_on_cpus_has_a_bundle_for_each_process(cluster: None, qwen3: Path) -> None:
    """All of them on one node: memory is shared there, and no GPU is."""
    on_cpu = topology_of(config(qwen3, servers=2, tp=2)).on("cpu")

    async def places() -> None:
        group = await reserve(on_cpu.bundles, 60)
        found = place(on_cpu, group)
        nodes = placement_group_table(group)["bundles_to_node_id"]
        assert len(set(nodes.values())) == 1
        assert (len(found.ranks), len(found.servers)) == (4, 2)
        bundles = [each["scheduling_strategy"].placement_group_bundle_index for each in [*found.ranks, *chain(*found.servers)]]
        assert sorted(bundles) == list(range(6))
        remove_placement_group(group)

    asyncio.run(places())


def test_each_process_sees_its_own_gpu_whatever_the_shell_says(cluster: None, qwen3: Path) -> None:
    """With RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1 Ray would hide none, and all ranks would take the first."""
    careless = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    given = decide(config(qwen3, servers=2, tp=2), careless)["trainer"]
    remote = ray.remote(num_gpus=1)(Visible)
    for environment, hidden in (({"env_vars": careless}, False), (ray_environment("cuda", given), True)):
        actor = remote.options(runtime_env=environment).remote()
        try:
            visible, own = ray.get(actor.devices.remote(), timeout=240)  # a process that imports all of this file
        finally:
            ray.kill(actor)  # the next test wants its GPU
        assert (visible == ",".join(own)) is hidden


def test_several_nodes_are_refused(cluster: None, qwen3: Path) -> None:
    """A run that finds room only on both nodes together, before anything of it is started."""

    async def scenario() -> None:
        run = config(qwen3, servers=2 * GPUS, tp=1, dp=2 * GPUS)
        topology = topology_of(run)
        group = await reserve(topology.bundles, 60)
        with pytest.raises(InputError, match=r"only on 2 nodes together; use weights.type=broadcast"):
            place(topology, group)
        remove_placement_group(group)

    asyncio.run(scenario())


class Row:
    """A part of bytes that tell its step, a piece and a bit long; it stands for a rank's state."""

    size, scheduler_steps = PIECE + 5, 7

    def __init__(self, fill: int) -> None:
        self.row = np.full(self.size, fill, dtype=np.uint8)

    def pieces(self, most: int) -> Iterator[tuple[int, np.ndarray]]:
        for begin in range(0, self.size, most):
            yield begin, self.row[begin : begin + most]

    def contents(self) -> Row:
        return self

    def packed(self) -> bytes:
        return b"contents"


class Rank:
    """An actor that hands such parts over as a rank of the trainer does."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def copy(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def hand_over(self, step: int, keeper: object, stays: int | None) -> Handed:
        return hand_over(Row(10 * step + self.rank), keeper, step, self.rank, stays)


def test_copies_are_kept_on_the_other_node_and_a_lost_keeper_is_replaced(cluster: None, tmp_path: Path) -> None:
    here, there = (node["NodeID"] for node in ray.nodes())
    options = {"num_cpus": 1, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
    remote = ray.remote(concurrency_groups={"memory": 1})(Rank).options(**options)
    trainer = TrainerGroup([Process(f"rank {rank}", remote.remote(rank), tmp_path / "log") for rank in range(2)], 180.0)
    keepers = Keepers(lambda: trainer, tmp_path, 180.0)  # in which keepers start too
    # a rank is up before it is asked for copies: starting two of them takes as long as the host wants
    ray.get([rank.actor.copy.remote() for rank in trainer.ranks], timeout=180)

    async def scenario() -> None:
        first = await keepers.copy(1, None)
        second = await keepers.copy(2, first)
        assert second.size == 2 * Row.size
        assert {await each.actor.node.remote() for each in second.keepers} == {there}
        for copy in (first, second):  # both are whole until the older one is let go
            read = reader([each.actor for each in copy.keepers], copy.step, lambda: None)
            assert [set(read(rank, PIECE - 5, PIECE + 5)) for rank in (0, 1)] == [{10 * copy.step}, {10 * copy.step + 1}]
        await keepers.retain(second)
        with pytest.raises(CopyLost, match="there is no part of rank 0 after step 1"):
            await asyncio.to_thread(reader([first.keepers[0].actor], 1, lambda: None), 0, 0, 1)
        ray.kill(second.keepers[0].actor)
        with pytest.raises(CopyLost, match="a keeper is gone"):
            await keepers.copy(3, second)
        assert not keepers.holds(second)
        third = await keepers.copy(4, None)
        assert keepers.holds(third)

    asyncio.run(scenario())
