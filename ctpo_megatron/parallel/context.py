"""Scans of sequences that context parallelism has cut into pieces: one small all-gather, nothing in the backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.algorithms.operators import Operator, check_length, segment_scan
from ctpo_megatron.algorithms.scan import (
    Channel,
    Joined,
    LocalScan,
    PieceTotals,
    Scan,
    Scanned,
    scan_pieces,
    segment_quantile,
)
from ctpo_megatron.parallel.gather import all_gather_single
from ctpo_megatron.parallel.layout import Layout, piece_places


class ContextParallelScan:
    """Scans the shards of `group`'s ranks, cut as `layout` says (see `parallel.layout`).

    Each rank scans its own pieces; the pieces' totals are gathered, a few int64 per channel, sequence and piece, whatever the
    sequences' lengths; an exclusive scan over them in token order is joined to the local result. Every rank of the group must
    call with the same channels and sequences, also those that hold no token of the policy.
    """

    def __init__(self, group: dist.ProcessGroup, layout: Layout = "zigzag", exact: bool = True) -> None:
        self.group, self.exact = group, exact
        self.rank, self.size = group.rank(), group.size()
        places = piece_places(layout, self.size)
        self._mine, self._per_rank = places[self.rank], len(places[0])
        # where piece 0, 1, 2 ... of a sequence is: (place in token order, rank, slot of the rank)
        self._pieces = sorted((place, rank, slot) for rank, held in enumerate(places) for slot, place in enumerate(held))

    def run(self, channels: Sequence[Channel], cu_seqlens: Tensor) -> list[Scanned]:
        """See `Scan.run`."""
        check_length(channels[0].values.shape[-1] * self.size)
        pieces = ((cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64) // len(self._pieces)).repeat_interleave(self._per_rank)
        bounds = torch.nn.functional.pad(torch.cumsum(pieces, 0), (1, 0))
        return scan_pieces(channels, bounds, self.exact, self._join)

    def per_token(self, values: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
        """See `Scan.per_token`."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64) // self.size
        return values.repeat_interleave(lengths, output_size=tokens)

    def quantile(self, values: Tensor, mask: Tensor, cu_seqlens: Tensor, q: float) -> Tensor:
        """See `Scan.quantile`. An order statistic is no sum of parts: this gathers the values, one per token."""
        mine = torch.where(mask, values.detach().to(torch.float64), torch.inf)
        gathered = mine.new_empty(self.size * mine.numel())
        all_gather_single(gathered, mine, self.group)
        sequences = cu_seqlens.numel() - 1
        ids = self.per_token(torch.arange(sequences, device=mine.device), cu_seqlens, mine.numel()).repeat(self.size)
        return segment_quantile(gathered, torch.isfinite(gathered), ids, sequences, q)

    def _join(self, pieces: list[PieceTotals]) -> list[Joined]:
        """Gather all channels' totals in one collective and scan them in token order."""
        rows = [_as_int64(piece.state) for piece in pieces]
        flags = [piece.closed.to(torch.int64).unsqueeze(0) for piece in pieces if piece.closed is not None]
        in_order = self._in_token_order(torch.cat(rows + flags))  # [rows, N, pieces of a sequence]
        sizes = [row.shape[0] for row in rows]
        states = torch.split(in_order[: sum(sizes)], sizes)
        closed = iter(in_order[sum(sizes) :])
        return [
            self.carry(piece.channel, _from_int64(state, piece.state.dtype), None if piece.closed is None else next(closed))
            for piece, state in zip(pieces, states, strict=True)
        ]

    def _in_token_order(self, mine: Tensor) -> Tensor:
        """All ranks' totals: [rows, M] int64 of every rank to [rows, N, pieces of a sequence]."""
        rows = mine.shape[0]
        mine = mine.contiguous()
        gathered = mine.new_empty((self.size * rows, mine.shape[1]))  # gloo wants the ranks joined along a dimension of `mine`
        all_gather_single(gathered, mine, self.group)
        by_rank = gathered.view(self.size, rows, -1, self._per_rank)
        return torch.stack([by_rank[rank, ..., slot] for _, rank, slot in self._pieces], dim=-1)

    def carry(self, channel: Channel, state: Tensor, closed: Tensor | None) -> Joined:
        """What lies before each of this rank's pieces, from all pieces' states [K, N, pieces] in token order."""
        operator = channel.operator
        if channel.backwards:
            state = state.flip(-1)
        first = torch.zeros(state.shape[1:], dtype=torch.int64, device=state.device)
        if closed is not None:  # a piece with a restart begins a new run
            first = torch.where(closed > 0, torch.arange(state.shape[-1], device=state.device), 0).cummax(-1).values
        inclusive = segment_scan(operator, state, first)
        before = shift(operator, inclusive)
        if channel.backwards:
            before = before.flip(-1)
        mine = torch.stack([before[..., place] for place in self._mine], dim=-1)
        return Joined(mine.reshape(state.shape[0], -1), inclusive[..., -1])


class MicroBatchScans:
    """The scan of each micro-batch, where its context-parallel size and the order of its pieces are its own.

    `groups`: for each size the group of that size that this rank is in; 1 needs none. The ranks of a group ask for the same
    micro-batches in the same order; ranks of other groups may do anything meanwhile.
    """

    def __init__(self, groups: Mapping[int, dist.ProcessGroup], exact: bool = True) -> None:
        self.groups, self.exact = groups, exact

    def of(self, cp_size: int, layout: Layout = "zigzag") -> Scan:
        """The scan of a micro-batch that `cp_size` ranks hold as `layout` says. Raises ValueError where no such group is."""
        if cp_size == 1 and isinstance(layout, str):
            return LocalScan(self.exact)
        if cp_size not in self.groups:
            known = ", ".join(str(size) for size in sorted({1, *self.groups}))
            raise ValueError(f"a micro-batch over {cp_size} context-parallel ranks; this rank has groups of {known}")
        return ContextParallelScan(self.groups[cp_size], layout, self.exact)


def _as_int64(state: Tensor) -> Tensor:
    """The bits of fixed point, or of float64, as int64."""
    return state if state.dtype == torch.int64 else state.to(torch.float64).contiguous().view(torch.int64)


def _from_int64(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.clone() if dtype == torch.int64 else bits.contiguous().view(torch.float64).to(dtype)


def shift(operator: Operator, inclusive: Tensor) -> Tensor:
    """Exclusive from inclusive states [K, N, pieces]."""
    return torch.cat([operator.empty_like(inclusive).expand(*inclusive.shape[:-1], 1), inclusive[..., :-1]], dim=-1)
