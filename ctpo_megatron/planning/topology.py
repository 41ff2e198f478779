"""Where the processes of a run are: which devices they use, who shares them, and what is reserved for each.

Decided here once, and read by placement in Ray, by SLURM's job files and by `ctpo plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.rollout import EngineConfig
from ctpo_megatron.config.weights import Transport
from ctpo_megatron.errors import ConfigError

Bundle = dict[str, float]  # what Ray reserves together on one node: {"CPU": 1.0, "GPU": 1.0}


@dataclass(frozen=True, slots=True)
class NodeCount:
    """Nodes that hold ranks of the trainer, nodes that hold servers, and those of them that hold both."""

    trainer: int
    servers: int
    both: int
    teachers: int = 0  # that hold nothing but servers of teachers

    @property
    def all(self) -> int:
        """Returns how many nodes there are together."""
        return self.trainer + self.servers - self.both + self.teachers


@dataclass(frozen=True, slots=True)
class ServerSet:
    """Servers of one model that are none of the trained one's."""

    servers: int
    tp: int  # ranks of each
    nodes: int  # that each spreads over

    @property
    def gpus(self) -> int:
        """GPUs of all; on CPUs their ranks."""
        return self.servers * self.tp

    def bundles(self, device: str) -> list[Bundle]:
        """What is reserved for them: a bundle for each part of a server on one of its nodes."""
        return [_bundle(1.0, float(self.tp // self.nodes) if device == "cuda" else 0.0)] * (self.servers * self.nodes)


@dataclass(frozen=True, slots=True)
class Topology:
    """Trainer ranks and servers of a run. Numbers that count GPUs are those of a run that is not on CPUs."""

    device: str  # cpu or cuda; auto: not yet known, and taken for cuda
    ranks: int  # of the trainer; 0: the run has none
    servers: int  # 0: the run has none
    server_tp: int = 1  # ranks of one server
    server_nodes: int = 1  # that each server spreads over
    colocated: bool = False  # the transport puts the servers on the trainer's devices
    within_node: bool = False  # the transport does not leave a node
    teachers: tuple[ServerSet, ...] = ()  # those whose servers the run starts

    @property
    def server_tp_per_node(self) -> int:
        """Ranks of one server on one node."""
        return self.server_tp // self.server_nodes

    @property
    def shares_gpus(self) -> bool:
        """Whether the servers use the trainer's GPUs."""
        return self.colocated and self.ranks > 0 and self.servers > 0 and self.device != "cpu"

    @property
    def ranks_beside(self) -> int:
        """Ranks of servers that may read memory of a trainer's GPU and are on another one; 0 unless they use the trainer's."""
        return self.servers * self.server_tp - 1 if self.shares_gpus else 0

    @property
    def needs_one_node(self) -> bool:
        """Whether all processes have to be on the same node."""
        return self.within_node and self.ranks > 0 and self.servers > 0

    @property
    def server_gpus(self) -> int:
        """GPUs of the servers besides the trainer's; of a run on CPUs: the servers' ranks."""
        return 0 if self.shares_gpus else self.servers * self.server_tp

    @property
    def gpus(self) -> int:
        """GPUs of the run: one per trainer rank, `server_tp` per server, unless servers use the trainer's, and the teachers'."""
        return self.ranks + self.server_gpus + self.teacher_gpus

    @property
    def teacher_gpus(self) -> int:
        """GPUs of teachers' servers; of a run on CPUs: their ranks."""
        return sum(each.gpus for each in self.teachers)

    def nodes(self, gpus_per_node: int) -> int:
        """The fewest nodes that hold all GPUs."""
        return self.node_count(gpus_per_node).all

    def node_count(self, gpus_per_node: int) -> NodeCount:
        """Which the fewest nodes are: a server's part stays on one node, ranks fill what servers leave free, teachers the rest.

        A part that is larger than a node is counted as if it could spread; `ctpo plan` and `ctpo slurm` refuse it.
        """
        without = self._without_teachers(gpus_per_node)
        free = without.all * gpus_per_node - self.ranks - self.server_gpus
        return replace(without, teachers=max(0, -(-(self.teacher_gpus - free) // gpus_per_node)))

    def _without_teachers(self, gpus_per_node: int) -> NodeCount:
        if self.shares_gpus or not self.servers:
            both = -(-self.ranks // gpus_per_node)
            return NodeCount(trainer=both, servers=both if self.servers else 0, both=both if self.servers else 0)
        part, parts = self.server_tp_per_node, self.servers * self.server_nodes
        of_servers = -(-parts // (gpus_per_node // part)) if part <= gpus_per_node else parts * -(-part // gpus_per_node)
        beside = min(self.ranks, of_servers * gpus_per_node - parts * part)
        of_trainer = -(-(self.ranks - beside) // gpus_per_node)
        both = 0 if not beside else min(of_servers, beside)
        return NodeCount(trainer=of_trainer + both, servers=of_servers, both=both)

    @property
    def bundles(self) -> list[Bundle]:
        """What is reserved in Ray for trainer and servers: those of the trainer first, then those of the servers."""
        return self.rank_bundles + self.server_bundles

    @property
    def teacher_bundles(self) -> list[Bundle]:
        """What is reserved besides, for teachers: those of the first one's servers first."""
        return [bundle for each in self.teachers for bundle in each.bundles(self.device)]

    @property
    def rank_bundles(self) -> list[Bundle]:
        """What is reserved for the trainer: a bundle for each rank. It has a GPU only once `device` is known to be cuda."""
        return [_bundle(2.0 if self.shares_gpus else 1.0, 1.0 if self.device == "cuda" else 0.0)] * self.ranks

    @property
    def server_bundles(self) -> list[Bundle]:
        """What is reserved for the servers: a bundle for each part that has no share in the trainer's.

        A part is what a server has on one of its nodes.
        """
        if self.shares_gpus:
            return []
        part = _bundle(1.0, float(self.server_tp_per_node) if self.device == "cuda" else 0.0)
        return [part] * (self.servers * self.server_nodes)

    @property
    def sharing_problem(self) -> str | None:
        """Why servers cannot use the trainer's GPUs where they are to; None where nothing is in the way."""
        used = self.servers * self.server_tp
        if not self.shares_gpus or used == self.ranks:
            return None
        return (
            "weights.type=colocated puts the servers on the trainer's GPUs, one of their ranks on each: "
            f"rollout.engine.servers * rollout.engine.tp = {used} must equal parallel.tp * cp * dp * pp = {self.ranks}; "
            "change one of them, or use weights.type=broadcast, with GPUs for the servers"
        )

    def check_sharing(self) -> None:
        """Raises ConfigError where servers that share the trainer's GPUs do not use each of them once."""
        if self.sharing_problem:
            raise ConfigError(self.sharing_problem)

    def on(self, device: str) -> Topology:
        """The same processes on `device`, cpu or cuda."""
        return replace(self, device=device)

    def with_layout(self, parallel: ParallelConfig) -> Topology:
        """The same run with the trainer in another layout."""
        return replace(self, ranks=parallel.world_size)


def make_topology(
    parallel: ParallelConfig,
    engine: EngineConfig,
    weights: Transport,
    device: str,
    *,
    trainer: bool = True,
    engines: bool = True,
    teachers: tuple[ServerSet, ...] = (),
) -> Topology:
    """The topology of a run with a trainer, with servers, or with both; `teachers` belong to one with both."""
    return Topology(
        device=device,
        ranks=parallel.world_size if trainer else 0,
        servers=engine.servers if engines else 0,
        server_tp=engine.tp,
        server_nodes=engine.nodes,
        colocated=weights.shares_devices,
        within_node=weights.within_node,
        teachers=teachers if trainer and engines else (),
    )


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
