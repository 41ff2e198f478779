"""Which devices a run uses and what is reserved for it. tests/integration/test_placement.py has the real placement."""

from __future__ import annotations

import pytest

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.rollout import EngineConfig
from ctpo_megatron.config.weights import BroadcastTransport, ColocatedTransport, DiskTransport
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.planning.topology import ServerSet, Topology, make_topology

FOUR = ParallelConfig(dp=4)
BROADCAST, COLOCATED = BroadcastTransport(), ColocatedTransport()


def topology(engine: EngineConfig, weights: BroadcastTransport | ColocatedTransport = BROADCAST, **which: bool) -> Topology:
    """That of four trainer ranks and servers on GPUs."""
    return make_topology(FOUR, engine, weights, "cuda", **which)


def test_bundles() -> None:
    """One for each rank where GPUs are shared, and one for each process elsewhere."""
    two = EngineConfig(servers=2, tp=2)
    shared, apart = topology(two, COLOCATED), topology(two)
    assert shared.bundles == [{"CPU": 2.0, "GPU": 1.0}] * 4
    assert apart.bundles == [{"CPU": 1.0, "GPU": 1.0}] * 4 + [{"CPU": 1.0, "GPU": 2.0}] * 2
    wide = topology(EngineConfig(servers=2, tp=4, nodes=2))
    assert wide.bundles == [{"CPU": 1.0, "GPU": 1.0}] * 4 + [{"CPU": 1.0, "GPU": 2.0}] * 4
    assert topology(two, COLOCATED, trainer=False).bundles == [{"CPU": 1.0, "GPU": 2.0}] * 2, "`ctpo eval` has no trainer"
    assert topology(two, COLOCATED, engines=False).bundles == [{"CPU": 1.0, "GPU": 1.0}] * 4, "`ctpo sft` has no servers"
    assert shared.on("cpu").bundles == [{"CPU": 1.0}] * 6
    assert (apart.rank_bundles, apart.server_bundles) == (apart.bundles[:4], apart.bundles[4:])
    assert apart.with_layout(ParallelConfig(tp=2)).bundles == apart.bundles[2:], "the servers stay as they are"
    assert [each.shares_gpus for each in (shared, apart, shared.on("cpu"))] == [True, False, False]


def test_gpus_and_nodes() -> None:
    two = EngineConfig(servers=2, tp=2)
    assert (topology(two).gpus, topology(two).server_gpus) == (8, 4)
    assert (topology(two, COLOCATED).gpus, topology(two, COLOCATED).server_gpus) == (4, 0)
    assert (topology(two, engines=False).gpus, topology(two, trainer=False).gpus) == (4, 4)
    assert [topology(two).nodes(per_node) for per_node in (8, 4, 3)] == [1, 2, 3]


def test_teachers_have_places_of_their_own() -> None:
    two, sets = EngineConfig(servers=2, tp=2), (ServerSet(1, 2, 1), ServerSet(2, 4, 2))
    run = make_topology(FOUR, two, BROADCAST, "cuda", teachers=sets)
    assert run.bundles == topology(two).bundles
    assert run.teacher_bundles == [{"CPU": 1.0, "GPU": 2.0}] * 5
    assert run.on("cpu").teacher_bundles == [{"CPU": 1.0}] * 5
    assert (run.teacher_gpus, run.gpus) == (10, 18)
    assert [run.nodes(per_node) for per_node in (18, 10, 8, 4)] == [1, 2, 3, 5]
    assert run.node_count(8).teachers == 2
    alone = make_topology(FOUR, two, BROADCAST, "cuda", trainer=False, teachers=sets)
    assert (alone.teachers, alone.gpus) == ((), 4), "`ctpo eval` asks no teacher"


def test_one_node_is_needed_where_weights_do_not_leave_it() -> None:
    """On CPUs too, and only where there is something to hand over."""
    two = EngineConfig(servers=2, tp=2)
    shared = topology(two, COLOCATED)
    assert [each.needs_one_node for each in (shared, shared.on("cpu"), topology(two))] == [True, True, False]
    assert not topology(two, COLOCATED, trainer=False).needs_one_node


def test_each_shared_gpu_is_used_once() -> None:
    topology(EngineConfig(servers=4), COLOCATED).check_sharing()
    topology(EngineConfig(servers=2, tp=2), COLOCATED).check_sharing()
    topology(EngineConfig(servers=2)).check_sharing()
    uneven = topology(EngineConfig(servers=2), COLOCATED)
    with pytest.raises(ConfigError, match=r"rollout.engine.servers \* rollout.engine.tp = 2 must equal .* = 4"):
        uneven.check_sharing()
    with pytest.raises(ConfigError, match=r"rollout.engine.servers \* rollout.engine.tp = 2 must equal"):
        topology(EngineConfig(tp=2), COLOCATED).check_sharing()
    uneven.on("cpu").check_sharing()


def test_what_is_asked_of_a_transport() -> None:
    """The capabilities by which the rest of the package tells transports apart."""
    disk = DiskTransport(directory="d")
    assert [each.shares_devices for each in (BROADCAST, COLOCATED, disk)] == [False, True, False]
    assert [each.within_node for each in (BROADCAST, COLOCATED, disk)] == [False, True, False]
    assert [each.needs_session for each in (BROADCAST, COLOCATED, disk)] == [True, True, False]
    assert [each.servers_sleep for each in (BROADCAST, COLOCATED, disk)] == [False, True, False]
    assert not ColocatedTransport(release=False).servers_sleep
