"""Prefix sums of sequences that context parallelism has cut into pieces: one small all-gather, nothing in the backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.algorithms.scan import PrefixSums, check_length, from_fixed, segment_cumsum, to_fixed


class ContextParallelScan:
    """Scans zigzag shards. Rank r of `group` holds pieces r and 2*cp-1-r of each sequence (see `zigzag_shard`).

    Each rank scans its own pieces, the pieces' totals ([C, N, 2] int64 per rank) are gathered, and an exclusive sum over them
    in global token order is added to the local result.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        pieces = 2 * self.size
        # global place of (rank, slot): slot 0 ascends with the rank, slot 1 descends
        self._place = torch.tensor([[rank, pieces - 1 - rank] for rank in range(self.size)])

    @property
    def is_first(self) -> bool:
        """See `Scan.is_first`."""
        return self.rank == 0

    def prefix_sums(self, channels: Tensor, cu_seqlens: Tensor) -> PrefixSums:
        """See `Scan.prefix_sums`."""
        check_length(channels.shape[1] * self.size)
        bounds = self._piece_bounds(cu_seqlens)
        inclusive, totals = segment_cumsum(to_fixed(channels), bounds)  # [C, T], [C, 2N]
        count, sequences = channels.shape[0], cu_seqlens.numel() - 1
        mine = totals.reshape(count, sequences, 2).contiguous()
        gathered = mine.new_empty((self.size * count, sequences, 2))  # gloo wants the ranks joined along a dimension of `mine`
        dist.all_gather_into_tensor(gathered, mine, group=self.group)
        place = self._place.to(mine.device)
        in_order = mine.new_empty((count, sequences, 2 * self.size))
        in_order[..., place.reshape(-1)] = gathered.view(self.size, *mine.shape).permute(1, 2, 0, 3).reshape(count, sequences, -1)
        before = torch.cumsum(in_order, dim=-1) - in_order
        offsets = before[..., place[self.rank]].reshape(count, -1)  # [C, 2N]
        lengths = bounds[1:] - bounds[:-1]
        inclusive = inclusive + offsets.repeat_interleave(lengths, dim=1, output_size=channels.shape[1])
        return PrefixSums(from_fixed(inclusive), from_fixed(in_order.sum(-1)))

    def sequence_ids(self, cu_seqlens: Tensor) -> Tensor:
        """See `Scan.sequence_ids`."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64) // self.size
        return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)

    def _piece_bounds(self, cu_seqlens: Tensor) -> Tensor:
        """Borders of this rank's contiguous pieces in its local order: [2N+1] int64."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64) // (2 * self.size)
        return torch.nn.functional.pad(torch.cumsum(lengths.repeat_interleave(2), 0), (1, 0))
