"""Context-parallel layouts of packed sequences: which contiguous pieces of every sequence a rank holds.

    zigzag      2 * cp equal pieces; rank r holds pieces r and 2 * cp - 1 - r, in that order. Under causal attention each
                rank then has the same work; it is the layout of Megatron's attention, and the default.
    contiguous  cp equal pieces; rank r holds piece r.

Any other order is given as the pieces of each rank (`Pieces`). A shard is the rank's pieces of the first sequence, then those of
the second, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ctpo_megatron.models.coords import RankCoords

Pieces = Sequence[Sequence[int]]
"""Of each rank the pieces that it holds, in its local order; numbered in token order, as many on every rank."""
Layout = Literal["zigzag", "contiguous"] | Pieces


def piece_places(layout: Layout, cp_size: int) -> list[list[int]]:
    """Pieces of each rank, in its local order: [cp][pieces per rank]; numbered in token order. One rank's are not cut by name.

    Raises ValueError for an unknown name, and for pieces that are not each on exactly one of `cp_size` ranks, as many on each.
    """
    if not isinstance(layout, str):
        places = [list(held) for held in layout]
        named = sorted(place for held in places for place in held)
        if len(places) != cp_size or len({len(held) for held in places}) != 1 or not named or named != list(range(len(named))):
            raise ValueError(
                f"pieces {places} for {cp_size} context-parallel ranks; allowed: one list for each rank, equally long, that "
                f"together hold 0, 1, 2 ... once each"
            )
        return places
    if layout == "zigzag" and cp_size > 1:
        return [[rank, 2 * cp_size - 1 - rank] for rank in range(cp_size)]
    if layout in ("zigzag", "contiguous"):
        return [[rank] for rank in range(cp_size)]
    raise ValueError(f"unknown layout {layout!r}; allowed: zigzag, contiguous")


def shard_indices(cu_seqlens: Tensor, cp_rank: int, cp_size: int, layout: Layout = "zigzag") -> Tensor:
    """Positions in the whole micro-batch that `cp_rank` holds, in its local order: [T / cp_size], int64, on cu_seqlens' device.

    Raises ValueError when a sequence's length is not a multiple of the layout's number of pieces.
    """
    starts = cu_seqlens[:-1].to(torch.int64)
    lengths = cu_seqlens[1:].to(torch.int64) - starts
    total = int(cu_seqlens[-1])
    if cp_size == 1 and isinstance(layout, str):
        return torch.arange(total, device=cu_seqlens.device)
    places = piece_places(layout, cp_size)
    per_rank = len(places[0])
    pieces = per_rank * cp_size
    if bool((lengths % pieces).any()):
        bad, name = int((lengths % pieces).nonzero()[0]), layout if isinstance(layout, str) else "this order"
        raise ValueError(
            f"sequence {bad} has length {int(lengths[bad])}; {name} over {cp_size} ranks needs multiples of {pieces}"
        )
    piece_lengths = lengths // pieces
    begins = torch.stack([starts + place * piece_lengths for place in places[cp_rank]], dim=1).reshape(-1)  # in local order
    sizes = piece_lengths.repeat_interleave(per_rank)
    local = torch.arange(total // cp_size, device=cu_seqlens.device)
    offsets = torch.cumsum(sizes, 0) - sizes
    return local + (begins - offsets).repeat_interleave(sizes, output_size=total // cp_size)


def shard(x: Tensor, cu_seqlens: Tensor, cp_rank: int, cp_size: int, layout: Layout = "zigzag") -> Tensor:
    """The part of `x` [T, ...] that `cp_rank` holds: [T / cp_size, ...]. See `shard_indices` for errors."""
    if cp_size == 1 and isinstance(layout, str):
        return x
    return x.index_select(0, shard_indices(cu_seqlens.to(x.device), cp_rank, cp_size, layout))


def unshard(shards: list[Tensor], cu_seqlens: Tensor, layout: Layout = "zigzag") -> Tensor:
    """The whole micro-batch [T, ...] from the shards of all ranks, in rank order; the inverse of `shard`."""
    cp_size = len(shards)
    if cp_size == 1 and isinstance(layout, str):
        return shards[0]
    cu = cu_seqlens.to(shards[0].device)
    order = torch.cat([shard_indices(cu, rank, cp_size, layout) for rank in range(cp_size)])
    joined = torch.cat(shards)
    return torch.empty_like(joined).index_copy(0, order, joined)


def zigzag_shard(x: Tensor, cu_seqlens: Tensor, cp_rank: int, cp_size: int) -> Tensor:
    """`shard` in the zigzag layout."""
    return shard(x, cu_seqlens, cp_rank, cp_size, "zigzag")


def zigzag_unshard(shards: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    """`unshard` in the zigzag layout."""
    return unshard(shards, cu_seqlens, "zigzag")


def own_experts(routed: Tensor, cu_seqlens: Tensor, coords: RankCoords) -> Tensor:
    """What the routers at `coords` see of `routed` [T, expert layers, k]: [T / (cp * tp), the rank's expert layers, k].

    Context parallelism cuts every sequence in zigzag; sequence parallelism then gives each tensor-parallel rank an equal run of
    what is left. All ranks' parts together are the whole, each entry once per replica.
    """
    local = zigzag_shard(routed[:, list(coords.expert_layers)], cu_seqlens, coords.cp_rank, coords.cp_size)
    length = len(local) // coords.tp_size
    return local[coords.tp_rank * length : (coords.tp_rank + 1) * length].clone()
