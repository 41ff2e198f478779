"""A witness on every node of a run: on the driver's own node in its process, elsewhere in an actor that needs no processor."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctpo_megatron.cluster.watch.witness import Witness
from ctpo_megatron.record.stalls import Condition

LOOK_S = 5.0  # for another node's answer; without one its processes have no condition
STACKS_S = 20.0

Place = tuple[str, int]  # node, pid


class Witnesses:
    """Looks at processes wherever they are. Belongs to the driver's event loop."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._here = Witness()
        self._elsewhere: dict[str, Any] = {}

    async def look(self, places: Mapping[Place, int]) -> dict[Place, Condition]:
        """The conditions of processes. `places`: for each one its working thread, see `Witness.look`."""
        by_node: dict[str, dict[int, int]] = defaultdict(dict)
        for (node, pid), thread in places.items():
            by_node[node][pid] = thread
        looked = await asyncio.gather(*(self._ask(node, "look", LOOK_S, pids) for node, pids in by_node.items()))
        return {(node, pid): each for node, found in zip(by_node, looked, strict=True) for pid, each in found.items()}

    async def stacks(self, logs: Mapping[Place, str]) -> dict[Place, str]:
        """The stacks of processes. `logs`: see `Witness.stacks`."""
        by_node: dict[str, dict[int, str]] = defaultdict(dict)
        for (node, pid), log in logs.items():
            by_node[node][pid] = log
        dumped = await asyncio.gather(*(self._ask(node, "stacks", STACKS_S, of) for node, of in by_node.items()))
        return {(node, pid): each for node, found in zip(by_node, dumped, strict=True) for pid, each in found.items()}

    async def kill(self, place: Place) -> None:
        """End a process that cannot end in order."""
        node, pid = place
        await self._ask(node, "kill", LOOK_S, pid)

    def forget(self) -> None:
        """Begin anew: this process was itself stopped."""
        self._here.forget()

    def close(self) -> None:
        """End the witnesses on other nodes."""
        for witness in self._elsewhere.values():
            ray.kill(witness)
        self._elsewhere.clear()

    async def _ask(self, node: str, method: str, timeout_s: float, argument: Any) -> Any:
        """What the witness of a node answers; nothing, where it does not in time or is gone: Ray tells of a lost node."""
        if node == self._node:
            if method == "look":
                return self._here.look(argument)  # some tens of microseconds for each process
            return await asyncio.to_thread(getattr(self._here, method), argument)
        try:
            asked = getattr(self._witness(node), method).remote(argument)
            return await asyncio.wait_for(asyncio.wrap_future(asked.future()), timeout_s)
        except (TimeoutError, ray.exceptions.RayError):
            return {}

    def _witness(self, node: str) -> Any:
        if node not in self._elsewhere:
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            self._elsewhere[node] = ray.remote(num_cpus=0)(Witness).options(scheduling_strategy=where).remote()
        return self._elsewhere[node]
