"""Where in Ray the processes of a run have their places, and the layout that there is room for.

The trainer's places are a placement group of their own. When a node of theirs is gone the group is given up and another one is
reserved: for the preferred layout where Ray has room for it in time, as on a spare node, else for the first smaller one. The
servers' group stays; Ray itself moves what it had on a lost node. Where weights do not leave a node all are in one group.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from ctpo_megatron.cluster.placement import Placement, place
from ctpo_megatron.cluster.ray_cluster import no_room, reserve, try_reserve
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.errors import TrainerLost
from ctpo_megatron.planning.topology import Topology
from ctpo_megatron.record.elastic_events import LayoutTaken, NodesLost
from ctpo_megatron.record.events import Emit

ANSWER_S = 5.0  # for Ray to find places where there is room, and to free those of processes that were just killed
PROBE_S = 2.0  # for a node's raylet to take a connection
LOOK_EVERY_S = 2.0


class Room:
    """The places of a run. `topology`: which processes there are, with the trainer in `config.parallel`."""

    def __init__(self, config: RunConfig, topology: Topology, emit: Emit) -> None:
        self._layouts, self._wait_s = config.layouts, config.elastic.wait_s
        self._timeout_s, self._emit = config.cluster.start_timeout_s, emit
        self._trainer: PlacementGroup | None = None
        self._servers: PlacementGroup | None = None  # of their own; None: in the trainer's, or there are none
        self._teachers: PlacementGroup | None = None  # None: the run starts no teacher's servers
        self._nodes: dict[str, tuple[str, int]] = {}  # of the trainer, by Ray's id: address and port of the raylet
        self.layout, self.topology, self.placement = config.parallel, topology, Placement()

    async def take(self) -> None:
        """Reserve places for all processes: servers, teachers' too, which need whole parts of nodes, then the trainer.

        Raises NoRoom where there is none within cluster.start_timeout_s, InputError where it is not where it must be.
        """
        topology = self.topology
        if topology.teacher_bundles:
            self._teachers = await reserve(topology.teacher_bundles, self._timeout_s)
        if topology.needs_one_node or not topology.ranks:
            self._trainer = await reserve(topology.bundles, self._timeout_s)
            self._settle(self.layout)
            return
        if topology.servers:
            self._servers = await reserve(topology.server_bundles, self._timeout_s)
        why = await self._reserve(self._wait_s)
        if self.layout != self._layouts[0]:
            self._tell(why)

    async def retake(self) -> None:
        """Places for a trainer that is started again: those that it had, unless nodes are gone or the layout is a smaller one.

        Raises NoRoom where there is none for any layout within cluster.start_timeout_s.
        """
        if self.topology.needs_one_node:
            return  # with that one the servers are gone too
        gone, before = await self._gone(), self.layout
        if not gone and before == self._layouts[0]:
            return
        if gone:
            self._emit(NodesLost(tuple(gone), self._wait_s if self._layouts[1:] else self._timeout_s, len(self._layouts) > 1))
        if self._trainer is not None:
            remove_placement_group(self._trainer)
        # without a loss there is no more room than before, unless nodes came back meanwhile
        why = await self._reserve(self._wait_s if gone else 0.0)
        if gone or self.layout != before:
            self._tell(f"{', '.join(gone)} is gone; {why}" if gone else why)

    async def until_lost(self) -> None:
        """Raises TrainerLost when a node that ranks are on is gone. Processes that are not up yet do not tell it themselves."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            gone = _dead(self._nodes, await asyncio.to_thread(ray.nodes))
            if gone:
                raise TrainerLost(f"the node {', '.join(gone)}, which ranks of the trainer are on, is gone")

    async def _reserve(self, wait_s: float) -> str:
        """Reserve places for the preferred layout, waiting `wait_s`, or else for a smaller one; returns why it is the one."""
        begun, smaller = time.monotonic(), self._layouts[1:]
        patience = max(wait_s, ANSWER_S) if smaller else self._timeout_s
        while True:
            for layout in self._layouts:
                bundles = self.topology.with_layout(layout).rank_bundles
                group = await try_reserve(bundles, min(patience, max(begun + self._timeout_s - time.monotonic(), 0.0)))
                if group is not None:
                    self._trainer = group
                    self._settle(layout)
                    return self._why(time.monotonic() - begun)
                patience = ANSWER_S
            if time.monotonic() - begun >= self._timeout_s:
                raise no_room(bundles, time.monotonic() - begun)

    def _settle(self, layout: ParallelConfig) -> None:
        """Note where the processes are that have places now."""
        assert self._trainer is not None, "a group is reserved"
        self.layout = layout
        if self.topology.ranks:
            self.topology = self.topology.with_layout(layout)
        self.placement = place(self.topology, self._trainer, self._servers, self._teachers)
        where = placement_group_table(self._trainer)["bundles_to_node_id"]
        used = {where[bundle] for bundle in range(self.topology.ranks)}
        self._nodes = {each["NodeID"]: _raylet(each) for each in ray.nodes() if each["NodeID"] in used}

    def _why(self, seconds: float) -> str:
        if self.layout == self._layouts[0]:
            return f"there is room for its {self.topology.ranks} ranks"
        return f"there was no room for more ranks within {seconds:.0f} s"

    def _tell(self, reason: str) -> None:
        preferred, nodes = self.layout == self._layouts[0], tuple(address for address, _ in self._nodes.values())
        self._emit(LayoutTaken(self.layout.model_dump(), self.topology.ranks, preferred, nodes, reason))

    async def _gone(self) -> list[str]:
        """The addresses of the trainer's nodes that are gone. Ray itself needs 15 s to notice; a connection tells it at once."""
        dead = _dead(self._nodes, await asyncio.to_thread(ray.nodes))
        answers = await asyncio.gather(*(_answers(*raylet) for raylet in self._nodes.values()))
        silent = [address for (address, _), answer in zip(self._nodes.values(), answers, strict=True) if not answer]
        return list(dict.fromkeys([*dead, *silent]))


def _dead(nodes: dict[str, tuple[str, int]], known: Iterable[dict[str, Any]]) -> list[str]:
    """The addresses of those of `nodes` that Ray does not count as alive."""
    alive = {each["NodeID"] for each in known if each["Alive"]}
    return [address for node, (address, _) in nodes.items() if node not in alive]


def _raylet(node: dict[str, Any]) -> tuple[str, int]:
    return node["NodeManagerAddress"], node["NodeManagerPort"]


async def _answers(address: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), PROBE_S)
    except OSError:  # also where time runs out
        return False
    writer.close()
    return True
