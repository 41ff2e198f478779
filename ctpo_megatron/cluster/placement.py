"""Which process of a run goes to which bundle of its placement group, and which GPUs a server sees.

Servers that share the trainer's GPUs (`weights.type: colocated`) get none from Ray: a bundle holds one rank and its GPU, and the
processes of a server go to the bundle of the first of `rollout.engine.tp` consecutive ranks, whose GPUs they use.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ctpo_megatron.errors import InputError
from ctpo_megatron.planning.topology import Topology

RayOptions = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerPlacement:
    """Ray's options for the actors of a server, one for each of its nodes, and the GPUs that it sees.

    No `gpus`: the server sees those that Ray gives to its actors.
    """

    parts: tuple[RayOptions, ...]
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Ray's options for the actors of a run: those of each rank, and those of each server, one for each of its nodes.

    `ranks_here`: for each rank, how many ranks are on its node.
    """

    ranks: list[RayOptions] = field(default_factory=list)
    ranks_here: list[int] = field(default_factory=list)
    servers: list[tuple[RayOptions, ...]] = field(default_factory=list)
    teachers: list[list[ServerPlacement]] = field(default_factory=list)  # of each that the run starts: its servers


def place(
    topology: Topology, group: PlacementGroup, servers: PlacementGroup | None = None, teachers: PlacementGroup | None = None
) -> Placement:
    """Ray's options for every actor of the run: the trainer's in `group`, the servers' in the group `servers`.

    `servers` was reserved for `topology.server_bundles`; without it `group` was reserved for all `topology.bundles`. `teachers`
    was for `topology.teacher_bundles`. Ranks are
    numbered in the order of their nodes, so that neighbours, tensor parallel first, share one. Raises InputError when a run
    that needs one node has several.
    """
    node_of = placement_group_table(group)["bundles_to_node_id"]
    count = len(set(node_of.values()))
    if topology.needs_one_node and count > 1:
        raise InputError(
            f"weights.type=colocated hands weights over within a node, but Ray found room for the run only on {count} "
            "nodes together; use weights.type=broadcast, or a smaller layout"
        )
    order = sorted(range(topology.ranks), key=lambda bundle: (node_of[bundle], bundle))
    own = topology.rank_bundles
    ranks = [_options(group, bundle, 1.0, min(1.0, own[bundle].get("GPU", 0.0))) for bundle in order]
    parts: list[tuple[RayOptions, ...]]
    if topology.shares_gpus:
        parts = [(_options(group, bundle, 1.0, 0.0),) for bundle in order[:: topology.server_tp]]
    else:
        parts = _server_places(topology, group if servers is None else servers, topology.ranks if servers is None else 0)
    on_node = Counter(node_of[bundle] for bundle in order)
    of_teachers = [] if teachers is None else _teacher_places(topology, teachers)
    return Placement(ranks, [on_node[node_of[bundle]] for bundle in order], parts, of_teachers)


def _teacher_places(topology: Topology, group: PlacementGroup) -> list[list[ServerPlacement]]:
    """Ray's options for the servers of each teacher, whose bundles are those of `group`."""
    options = iter([_options(group, at, 1.0, bundle.get("GPU", 0.0)) for at, bundle in enumerate(topology.teacher_bundles)])
    return [
        [ServerPlacement(tuple(next(options) for _ in range(each.nodes))) for _ in range(each.servers)]
        for each in topology.teachers
    ]


def _server_places(topology: Topology, group: PlacementGroup, first: int) -> list[tuple[RayOptions, ...]]:
    """Ray's options for each server's parts, whose bundles begin at number `first` of `group`."""
    bundles, nodes = topology.server_bundles, topology.server_nodes
    options = [_options(group, first + at, 1.0, bundle.get("GPU", 0.0)) for at, bundle in enumerate(bundles)]
    return [tuple(options[at : at + nodes]) for at in range(0, len(options), nodes)]


def share_gpus(gpus: list[list[str]], servers: list[tuple[RayOptions, ...]], tp: int) -> list[ServerPlacement]:
    """For each server, the GPUs that it sees: first the `tp` that it uses, then the others, since weights come from any of them.

    `gpus`: those of each trainer rank, by CUDA's names.
    """
    found = []
    for number, parts in enumerate(servers):
        own, others = gpus[number * tp : (number + 1) * tp], gpus[: number * tp] + gpus[(number + 1) * tp :]
        found.append(ServerPlacement(parts, tuple(chain(*own, *others))))
    return found


def _options(group: PlacementGroup, bundle: int, cpus: float, gpus: float) -> RayOptions:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}
