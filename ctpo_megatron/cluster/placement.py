"""Which process of a run goes to which bundle of its placement group, and which GPUs a server sees.

Servers that share the trainer's GPUs (`weights.type: colocated`) get none from Ray: a bundle holds one rank and its GPU, and the
processes of a server go to the bundle of the first of `rollout.engine.tp` consecutive ranks, whose GPUs they use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import ConfigError, InputError

RayOptions = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerPlace:
    """Where the actors of a server go, one for each of its nodes, and the GPUs that it sees; none: those that Ray gives them."""

    parts: tuple[RayOptions, ...]
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Places:
    """Ray's options for the actors of a run, by rank, and by server and node of it."""

    ranks: list[RayOptions] = field(default_factory=list)
    servers: list[tuple[RayOptions, ...]] = field(default_factory=list)


def shares_gpus(config: RunConfig, *, trainer: bool, engines: bool) -> bool:
    """Whether the servers use the trainer's GPUs."""
    return trainer and engines and config.weights.type == "colocated" and config.cluster.device != "cpu"


def check_shared(config: RunConfig) -> None:
    """Raises ConfigError where servers that share the trainer's GPUs do not use each of them once."""
    if config.sharing_problem:
        raise ConfigError(config.sharing_problem)


def bundles_of(config: RunConfig, *, trainer: bool, engines: bool) -> list[dict[str, float]]:
    """What is reserved: for each of the trainer's ranks first, then for each part of a server that has no share in those."""
    gpu, engine = config.cluster.device == "cuda", config.rollout.engine
    ranks, servers = config.parallel.world_size if trainer else 0, engine.servers if engines else 0
    if shares_gpus(config, trainer=trainer, engines=engines):
        return [{"CPU": 2.0} | ({"GPU": 1.0} if gpu else {})] * ranks
    rank = {"CPU": 1.0} | ({"GPU": 1.0} if gpu else {})
    part = {"CPU": 1.0} | ({"GPU": float(engine.tp_per_node)} if gpu else {})
    return [rank] * ranks + [part] * (servers * engine.nodes)


def place(config: RunConfig, group: PlacementGroup, *, trainer: bool, engines: bool) -> Places:
    """Ranks in the order of their nodes, so that neighbours, tensor parallel first, share one; `group` has `bundles_of`.

    Raises InputError when trainer and servers of a colocated run are on several nodes.
    """
    node_of, bundles = placement_group_table(group)["bundles_to_node_id"], bundles_of(config, trainer=trainer, engines=engines)
    count = len(set(node_of.values()))
    if trainer and engines and config.weights.type == "colocated" and count > 1:
        raise InputError(
            f"weights.type=colocated hands weights over within a node, but Ray found room for the run only on {count} "
            "nodes together; use weights.type=broadcast, or a smaller layout"
        )
    world = config.parallel.world_size if trainer else 0
    order = sorted(range(world), key=lambda bundle: (node_of[bundle], bundle))
    ranks = [_options(group, bundle, 1.0, min(1.0, bundles[bundle].get("GPU", 0.0))) for bundle in order]
    if shares_gpus(config, trainer=trainer, engines=engines):
        servers = [(_options(group, bundle, 1.0, 0.0),) for bundle in order[:: config.rollout.engine.tp]]
    else:
        parts = [_options(group, bundle, 1.0, bundles[bundle].get("GPU", 0.0)) for bundle in range(world, len(bundles))]
        nodes = config.rollout.engine.nodes
        servers = [tuple(parts[at : at + nodes]) for at in range(0, len(parts), nodes)]
    return Places(ranks, servers)


def share_gpus(gpus: list[list[str]], servers: list[tuple[RayOptions, ...]], tp: int) -> list[ServerPlace]:
    """`gpus` of each rank, by which a server sees first the `tp` that it uses, then the others: weights come from any of them."""
    found = []
    for number, parts in enumerate(servers):
        own, others = gpus[number * tp : (number + 1) * tp], gpus[: number * tp] + gpus[(number + 1) * tp :]
        found.append(ServerPlace(parts, tuple(chain(*own, *others))))
    return found


def _options(group: PlacementGroup, bundle: int, cpus: float, gpus: float) -> RayOptions:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}
