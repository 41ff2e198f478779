"""All keepers of a run, as the loop sees them (`loop.protocols.Keepers`).

They are started when the first copy is handed over, on nodes that the ranks' places tell, and are no part of the trainer: it
comes and goes, and they stay, until Ray ends. One that is lost is replaced at the next copy; what it held is gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctpo_megatron.cluster.calls import Process, call_all
from ctpo_megatron.cluster.keepers.actor import THREADS, KeeperActor
from ctpo_megatron.cluster.keepers.calls import Handed
from ctpo_megatron.cluster.keepers.places import keeping_node
from ctpo_megatron.cluster.trainer.group import TrainerGroup
from ctpo_megatron.errors import CopyLost, ProcessDied

ALIVE_WITHIN_S = 20.0  # a keeper that does not say so in this time is given up


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that keepers hold all of: the state after training step `step`, the part of rank r with `keepers[r]`."""

    step: int
    keepers: tuple[Process, ...]
    parts: tuple[Handed, ...]
    stood_s: float  # in which the ranks did nothing else

    @property
    def size(self) -> int:
        """Returns its bytes."""
        return sum(part.size for part in self.parts)

    @property
    def scheduler_steps(self) -> int:
        """Returns how many optimizer steps were made."""
        return self.parts[0].scheduler_steps


class Keepers:
    """Starts keepers, lets ranks hand over to them and take back. `trainer`: returns the present one."""

    def __init__(self, trainer: Callable[[], TrainerGroup], logs: Path, timeout_s: float) -> None:
        self._trainer, self._logs, self._timeout_s = trainer, logs, timeout_s
        self._of: dict[str, Process] = {}  # by the node whose ranks they serve
        self._started = 0

    async def copy(self, step: int, stays: Copy | None) -> Copy:
        """Returns a copy of the trainer's state, which it has after training step `step`, when keepers hold all of it.

        `stays`: the one that is not to go before that. Raises CopyLost where it did not come about, TrainerLost for a lost rank.
        """
        trainer, begun = self._trainer(), time.monotonic()
        nodes = await trainer.copy()
        stood = time.monotonic() - begun
        keepers = await self._keepers_for(nodes)
        try:
            actors = [keeper.actor for keeper in keepers]
            parts = await trainer.hand_over(step, actors, None if stays is None else stays.step, self._timeout_s)
        except (CopyLost, ProcessDied) as error:
            await self._weed()
            raise CopyLost(str(error).splitlines()[0]) from error
        return Copy(step, tuple(keepers), tuple(parts), stood)

    async def retain(self, copy: Copy) -> None:
        """Let keepers drop everything but `copy`. Raises CopyLost where one does not answer."""
        try:
            await call_all([(keeper, keeper.actor.retain.remote(copy.step)) for keeper in self._of.values()], ALIVE_WITHIN_S)
        except ProcessDied as error:
            await self._weed()
            raise CopyLost(str(error).splitlines()[0]) from error

    def holds(self, copy: Copy) -> bool:
        """Whether all keepers of `copy` are there still, as far as is known."""
        return set(copy.keepers) <= set(self._of.values())

    async def recall(self, copy: Copy) -> None:
        """Let the trainer, which has just been started, take its state from `copy`. Raises CopyLost, and it is unchanged then."""
        trainer = self._trainer()
        if len(trainer.ranks) != len(copy.parts):
            raise CopyLost(f"it is of {len(copy.parts)} ranks, and the trainer has {len(trainer.ranks)}")
        actors, digests = [keeper.actor for keeper in copy.keepers], [part.digest for part in copy.parts]
        try:
            await trainer.recall(copy.step, actors, digests)
        except CopyLost:
            await self._weed()
            raise

    async def _keepers_for(self, nodes: list[str]) -> list[Process]:
        """Returns the keeper of each rank; `nodes` are those that the ranks are on."""
        if missing := set(nodes) - self._of.keys():
            alive = [node["NodeID"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
            self._of |= {node: self._start(keeping_node(node, set(nodes), alive)) for node in sorted(missing)}
        return [self._of[node] for node in nodes]

    def _start(self, node: str) -> Process:
        name, log = f"keeper {self._started}", self._logs / f"keeper_{self._started}.log"
        self._started += 1
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = ray.remote(KeeperActor).options(num_cpus=0, max_concurrency=THREADS, scheduling_strategy=there)
        return Process(name, actor.remote(str(log)), log)

    async def _weed(self) -> None:
        """Give up the keepers that do not answer."""
        for node, keeper in list(self._of.items()):
            try:
                await asyncio.wait_for(asyncio.wrap_future(keeper.actor.node.remote().future()), ALIVE_WITHIN_S)
            except (ray.exceptions.RayError, TimeoutError):
                ray.kill(keeper.actor)
                del self._of[node]
