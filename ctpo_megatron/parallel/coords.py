"""A trainer rank's place among the others, and which part of a record of routing is its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ctpo_megatron.parallel.layout import zigzag_shard


@dataclass(frozen=True, slots=True)
class RankCoords:
    """Where a rank sits. `expert_layers` are places among the model's layers with experts, in the order of the rank's chunks."""

    dp_rank: int
    cp_rank: int
    cp_size: int
    tp_rank: int
    tp_size: int
    expert_layers: tuple[int, ...]


def own_experts(routed: Tensor, cu_seqlens: Tensor, coords: RankCoords) -> Tensor:
    """What the routers at `coords` see of `routed` [T, expert layers, k]: [T / (cp * tp), the rank's expert layers, k].

    Context parallelism cuts every sequence in zigzag; sequence parallelism then gives each tensor-parallel rank an equal run of
    what is left. All seats' parts together are the whole, each entry once per replica.
    """
    local = zigzag_shard(routed[:, list(coords.expert_layers)], cu_seqlens, coords.cp_rank, coords.cp_size)
    length = len(local) // coords.tp_size
    return local[coords.tp_rank * length : (coords.tp_rank + 1) * length].clone()
