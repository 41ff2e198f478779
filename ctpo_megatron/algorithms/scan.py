"""Segmented scans over packed sequences, as the objectives ask for them.

Sums of log-ratios are accumulated as int64 fixed point, so they are exact in any order: a token's prefix sum is the same bit
for every packing, device and context-parallel size. A log-ratio is clamped to +-20 before it enters, so a sequence may hold
about 1.6 million tokens before int64 could overflow; longer micro-batches are refused. Minima and maxima never round.
What is left (discounted returns, position-weighted sums, sums of unbounded values) is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ctpo_megatron.algorithms.operators import SUM, Operator, check_length, lift, lower, piece_sums, segment_scan

Reach = Literal["prefix", "before", "suffix", "after", "sequence"]
"""Tokens that count for token t: up to and with it, before it, from it on, after it, all of its sequence."""


class Channel(NamedTuple):
    """One statistic to scan. Values carry the operator's identity where a token must not count (0 for sums)."""

    values: Tensor  # [T], for sums also bool; for AFFINE and RAMP [2, T]; no gradient passes
    operator: Operator = SUM
    reach: Reach = "prefix"
    restarts: Tensor | None = None  # [T] bool: the statistic begins anew at these tokens; not for suffixes

    @property
    def backwards(self) -> bool:
        """Whether it runs from the end of a sequence to its beginning."""
        return self.reach in ("suffix", "after")


class Scanned(NamedTuple):
    """Result for one channel. With restarts, `totals` are those of the last run of each sequence."""

    values: Tensor  # [T], in the dtype of the channel's values; float32 for bool, which counts up to 2**24; empty for `sequence`
    totals: Tensor  # [N] float64, over whole sequences, also the parts that other ranks hold


class PieceTotals(NamedTuple):
    """What a rank tells the others about one channel, for its M contiguous pieces in local order."""

    channel: Channel
    state: Tensor  # [K, M]; with restarts, of the tokens since the last one
    closed: Tensor | None  # [M] bool: the piece holds a restart, so nothing before it counts after it; None without restarts


class Joined(NamedTuple):
    """What a rank learns about one channel."""

    carry: Tensor | None  # [K, M]: state of all tokens before (or, backwards, after) each of its pieces; None: there are none
    totals: Tensor  # [K, N]


class Scan(Protocol):
    """Where the statistics of a sequence come from: one device, or several that each hold pieces of it.

    `cu_seqlens` [N+1] always means the WHOLE sequences; streams hold this rank's tokens only.
    """

    exact: bool

    def run(self, channels: Sequence[Channel], cu_seqlens: Tensor) -> list[Scanned]:
        """Scan all channels at once: under context parallelism one collective. Raises ValueError for what is too long."""
        ...

    def per_token(self, values: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
        """Values of sequences [N] given to each of the local tokens: [tokens]."""
        ...

    def quantile(self, values: Tensor, mask: Tensor, cu_seqlens: Tensor, q: float) -> Tensor:
        """Linearly interpolated quantile of each whole sequence's unmasked values: [N] float64, 0 where there are none."""
        ...


class LocalScan:
    """Whole sequences on this device. `exact`: sums in fixed point; else in float64, for comparison."""

    def __init__(self, exact: bool = True) -> None:
        self.exact = exact

    def run(self, channels: Sequence[Channel], cu_seqlens: Tensor) -> list[Scanned]:
        """See `Scan.run`."""
        check_length(channels[0].values.shape[-1])
        bounds = cu_seqlens.to(torch.int64)  # nothing to wait for: one channel after another takes less memory
        return [scanned for channel in channels for scanned in scan_pieces([channel], bounds, self.exact, _alone)]

    def per_token(self, values: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
        """See `Scan.per_token`."""
        return values.repeat_interleave((cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64), output_size=tokens)

    def quantile(self, values: Tensor, mask: Tensor, cu_seqlens: Tensor, q: float) -> Tensor:
        """See `Scan.quantile`."""
        sequences = cu_seqlens.numel() - 1
        ids = self.per_token(torch.arange(sequences, device=values.device), cu_seqlens, values.numel())
        return segment_quantile(values, mask, ids, sequences, q)


def _alone(pieces: list[PieceTotals]) -> list[Joined]:
    return [Joined(None, piece.state) for piece in pieces]


def scan_pieces(
    channels: Sequence[Channel], bounds: Tensor, exact: bool, join: Callable[[list[PieceTotals]], list[Joined]]
) -> list[Scanned]:
    """Scan contiguous pieces with borders `bounds` [M+1]; `join` knows how pieces make up sequences."""
    local = [_Piecewise(channel, bounds, exact) for channel in channels]
    return [piecewise.finish(joined) for piecewise, joined in zip(local, join([p.totals() for p in local]), strict=True)]


class _Piecewise:
    """One channel scanned within this device's pieces. Backward channels are flipped here, and back at the end."""

    def __init__(self, channel: Channel, bounds: Tensor, exact: bool) -> None:
        if channel.backwards and channel.restarts is not None:
            raise ValueError("a suffix scan takes no restarts")
        self.channel, self.size = channel, channel.values.shape[-1]
        self.bounds = self.size - bounds.flip(0) if channel.backwards else bounds
        self.lengths = self.bounds[1:] - self.bounds[:-1]
        values = channel.values.flip(-1) if channel.backwards else channel.values
        state = lift(channel.operator, values, exact)
        if state.dtype == torch.int64 and channel.restarts is None and self.size:
            self.state = piece_sums(state, self.bounds)
        else:
            self.state = segment_scan(channel.operator, state, self._first(channel.restarts))

    def _first(self, restarts: Tensor | None) -> Tensor:
        """Where the run of each token begins: [T]. A restart that is a piece's first token begins a run there, too."""
        begin = self._begin()
        return begin if restarts is None else torch.maximum(begin, self._last_restart(restarts))

    def _begin(self) -> Tensor:
        """Where the piece of each token begins: [T]."""
        return self.bounds[:-1].to(torch.int32).repeat_interleave(self.lengths, output_size=self.size)

    def _last_restart(self, restarts: Tensor) -> Tensor:
        if not self.size:
            return restarts.to(torch.int32)
        place = torch.arange(self.size, dtype=torch.int32, device=restarts.device)
        return torch.where(restarts, place, -1).cummax(0).values

    def _closed(self) -> Tensor | None:
        """Whether a restart lies between the piece's beginning and the token, or is it: [T]."""
        if self.channel.restarts is None:
            return None
        return self._last_restart(self.channel.restarts) >= self._begin()

    def totals(self) -> PieceTotals:
        """The pieces' totals, in the stream's own order."""
        empty = self.channel.operator.empty_like(self.state)
        if not self.size:
            return PieceTotals(self.channel, empty.expand(-1, self.lengths.numel()), None)
        last = (self.bounds[1:] - 1).clamp(min=0)
        state = torch.where(self.lengths > 0, self.state.index_select(-1, last), empty)
        closed = self._closed()
        if closed is not None:
            closed = closed[last] & (self.lengths > 0)
        if self.channel.reach == "sequence":
            self.state = empty  # nothing per token is asked for
        return PieceTotals(self.channel, state.flip(-1) if self.channel.backwards else state, closed)

    def finish(self, joined: Joined) -> Scanned:
        """The channel's result, with what lies before this device's pieces."""
        channel, totals = self.channel, lower(joined.totals).to(torch.float64)
        dtype = channel.values.dtype if channel.values.dtype.is_floating_point else torch.float32
        if channel.reach == "sequence" or not self.size:
            return Scanned(torch.empty(0, dtype=dtype, device=totals.device), totals)
        state, combine = self.state, channel.operator.combine
        if joined.carry is None:
            state = state[-1:]  # the result's row alone, as nothing will be combined
        if channel.reach in ("before", "after"):
            begins = self._first(channel.restarts) == torch.arange(self.size, device=state.device)
            empty = channel.operator.empty_like(self.state)[-len(state) :]
            state = torch.where(begins, empty, state.roll(1, -1))
        if joined.carry is not None:
            carry = joined.carry.flip(-1) if channel.backwards else joined.carry
            carried = combine(carry.repeat_interleave(self.lengths, dim=-1, output_size=self.size), state)
            closed = self._closed()
            state = carried if closed is None else torch.where(closed, state, carried)
        values = lower(state).to(dtype)
        return Scanned(values.flip(-1) if channel.backwards else values, totals)


def segment_quantile(values: Tensor, mask: Tensor, ids: Tensor, segments: int, q: float) -> Tensor:
    """Linearly interpolated quantile `q` of the unmasked `values` [T] of each segment: [segments] float64, 0 where empty."""
    wide = torch.where(mask, values.detach().to(torch.float64), torch.inf)
    order = wide.argsort(stable=True)
    order = order[ids[order].argsort(stable=True)]  # by segment, then by value; masked ones last
    ranked = torch.nn.functional.pad(wide[order], (0, 1))
    zeros = torch.zeros(segments, dtype=torch.int64, device=values.device)
    begin = torch.nn.functional.pad(zeros.index_add(0, ids, torch.ones_like(ids)).cumsum(0), (1, 0))[:-1]
    count = zeros.index_add(0, ids, mask.to(torch.int64))
    place = (count - 1).clamp(min=0).to(torch.float64) * q
    low = place.floor().to(torch.int64)
    high = torch.minimum(low + 1, (count - 1).clamp(min=0))
    below, above = ranked[begin + low], ranked[begin + high]
    return torch.where(count > 0, below + (above - below) * (place - low), 0.0)
