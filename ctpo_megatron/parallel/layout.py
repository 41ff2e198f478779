"""Context-parallel layouts of packed sequences.

Zigzag cuts every sequence into 2 * cp_size equal pieces and gives rank r the pieces r and 2 * cp_size - 1 - r, in that order,
sequence after sequence: under causal attention each rank then has the same work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag_indices(cu_seqlens: Tensor, cp_rank: int, cp_size: int) -> Tensor:
    """Positions in the whole pack that `cp_rank` holds, in its local order: [T / cp_size], int64, on cu_seqlens' device.

    Raises ValueError when a sequence's length is not a multiple of 2 * cp_size.
    """
    starts = cu_seqlens[:-1].to(torch.int64)
    lengths = cu_seqlens[1:].to(torch.int64) - starts
    total = int(cu_seqlens[-1])
    if cp_size == 1:
        return torch.arange(total, device=cu_seqlens.device)
    pieces = 2 * cp_size
    if bool((lengths % pieces).any()):
        bad = int((lengths % pieces).nonzero()[0])
        raise ValueError(
            f"sequence {bad} has length {int(lengths[bad])}; zigzag over {cp_size} ranks needs multiples of {pieces}"
        )
    piece_lengths = lengths // pieces
    firsts = starts + cp_rank * piece_lengths
    seconds = starts + (pieces - 1 - cp_rank) * piece_lengths
    begins = torch.stack([firsts, seconds], dim=1).reshape(-1)  # [2N], in local order
    sizes = piece_lengths.repeat_interleave(2)
    local = torch.arange(total // cp_size, device=cu_seqlens.device)
    offsets = torch.cumsum(sizes, 0) - sizes
    return local + (begins - offsets).repeat_interleave(sizes, output_size=total // cp_size)


def zigzag_shard(x: Tensor, cu_seqlens: Tensor, cp_rank: int, cp_size: int) -> Tensor:
    """The part of `x` [T, ...] that `cp_rank` holds: [T / cp_size, ...]. See `zigzag_indices` for errors."""
    if cp_size == 1:
        return x
    return x.index_select(0, zigzag_indices(cu_seqlens.to(x.device), cp_rank, cp_size))


def zigzag_unshard(shards: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    """The whole pack [T, ...] from the shards of all ranks, in rank order; the inverse of `zigzag_shard`."""
    cp_size = len(shards)
    if cp_size == 1:
        return shards[0]
    cu = cu_seqlens.to(shards[0].device)
    order = torch.cat([zigzag_indices(cu, rank, cp_size) for rank in range(cp_size)])
    whole = torch.empty_like(torch.cat(shards))
    return whole.index_copy(0, order, torch.cat(shards))
