"""Which ranks form which group of the trainer, as megatron orders them: tp-cp-ep-dp-pp, the leftmost axis fastest.

Experts have their own grid over the ranks of one pipeline stage: etp-ep-edp instead of tp-cp-dp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ctpo_megatron.config.model import ParallelConfig


@dataclass(frozen=True, slots=True)
class Group:
    """All groups of one kind."""

    name: str
    purpose: str
    ranks: list[list[int]]  # of each group, ascending
    of_experts: bool = False

    @property
    def size(self) -> int:
        """Ranks of one group."""
        return len(self.ranks[0])

    def nodes(self, gpus_per_node: int) -> int:
        """Over how many nodes the widest-spread group reaches, when ranks fill nodes in order."""
        return max(len({rank // gpus_per_node for rank in group}) for group in self.ranks)


def expert_data_parallel(parallel: ParallelConfig) -> int:
    """Ranks that hold the same experts."""
    return parallel.tp * parallel.cp * parallel.dp // (parallel.ep * parallel.etp)


def rank_groups(parallel: ParallelConfig) -> list[Group]:
    """Every kind of group; those of size 1 too."""
    p = parallel
    dense = {"tp": p.tp, "cp": p.cp, "dp": p.dp, "pp": p.pp}
    expert = {"etp": p.etp, "ep": p.ep, "edp": expert_data_parallel(p), "pp": p.pp}
    return [
        Group("TP", "matrices, norms' tokens", _groups(dense, {"tp"})),
        Group("CP", "tokens of every sequence", _groups(dense, {"cp"})),
        Group("DP", "samples", _groups(dense, {"dp"})),
        Group("DP x CP", "optimizer state", _groups(dense, {"dp", "cp"})),
        Group("PP", "layers", _groups(dense, {"pp"})),
        Group("EP", "experts", _groups(expert, {"ep"}), of_experts=True),
        Group("ETP", "matrices of experts", _groups(expert, {"etp"}), of_experts=True),
        Group("EDP", "experts' optimizer state", _groups(expert, {"edp"}), of_experts=True),
    ]


def _groups(sizes: dict[str, int], axes: set[str]) -> list[list[int]]:
    """Ranks that agree on every axis but `axes`; `sizes` from the fastest axis to the slowest."""
    strides, stride = {}, 1
    for name, size in sizes.items():
        strides[name], stride = stride, stride * size
    inside = [name for name in sizes if name in axes]
    outside = [name for name in sizes if name not in axes]
    starts, steps = _offsets(outside, sizes, strides), _offsets(inside, sizes, strides)
    return [[start + step for step in steps] for start in starts]


def _offsets(names: list[str], sizes: dict[str, int], strides: dict[str, int]) -> list[int]:
    count, found = math.prod(sizes[name] for name in names), []
    for index in range(count):
        offset = 0
        for name in names:
            index, coordinate = divmod(index, sizes[name])
            offset += coordinate * strides[name]
        found.append(offset)
    return found
