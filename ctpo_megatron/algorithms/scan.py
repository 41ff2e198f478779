"""Segmented prefix sums over packed sequences, as the objectives ask for them.

Sums of log-ratios are accumulated as int64 fixed point, so they are exact in any order: a token's prefix sum is the same bit
for every packing, device and context-parallel size. A log-ratio is clamped to +-20 before it enters, so a sequence may hold
about 1.6 million tokens before int64 could overflow; longer packs are refused.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FRACTION_BITS = 38
MAX_ABS = 20.0
MAX_TOKENS = int(2**63 / (MAX_ABS * 2**FRACTION_BITS))


class PrefixSums(NamedTuple):
    """Result of a scan over C channels."""

    inclusive: Tensor  # [C, T] float64: sum over the sequence's tokens up to and including t
    totals: Tensor  # [C, N] float64: sum over the whole sequence, also the parts other ranks hold


class Scan(Protocol):
    """Where the prefix sums of a sequence come from: one device, or several that each hold pieces of it.

    Every method that takes `cu_seqlens` [N+1] means the WHOLE sequences; streams hold this rank's tokens only.
    """

    def prefix_sums(self, channels: Tensor, cu_seqlens: Tensor) -> PrefixSums:
        """Segmented inclusive sums of `channels` [C, T_local]; |values| at most 20; no gradient passes."""
        ...

    def sequence_ids(self, cu_seqlens: Tensor) -> Tensor:
        """Which sequence each local token belongs to: [T_local] int64."""
        ...

    @property
    def is_first(self) -> bool:
        """True on exactly one of the ranks that share the sequences; it accounts for what must be counted once."""
        ...


def to_fixed(values: Tensor) -> Tensor:
    """Fixed-point int64 of `values`."""
    return torch.round(values.detach().to(torch.float64) * 2.0**FRACTION_BITS).to(torch.int64)


def from_fixed(values: Tensor) -> Tensor:
    """float64 of fixed-point int64 `values`."""
    return values.to(torch.float64) * 2.0**-FRACTION_BITS


def check_length(tokens: int) -> None:
    """Raise ValueError when sums over so many tokens could overflow."""
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens in one pack; exact prefix sums hold up to {MAX_TOKENS}. Use smaller micro-batches.")


def segment_cumsum(fixed: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Inclusive sums [C, T] that restart at each of `bounds` [M+1], and the segments' totals [C, M]. int64, hence exact."""
    running = torch.cumsum(fixed, dim=1)
    padded = torch.nn.functional.pad(running, (1, 0))
    before = padded.index_select(1, bounds[:-1].to(torch.int64))
    totals = padded.index_select(1, bounds[1:].to(torch.int64)) - before
    lengths = (bounds[1:] - bounds[:-1]).to(torch.int64)
    return running - before.repeat_interleave(lengths, dim=1, output_size=fixed.shape[1]), totals


class LocalScan:
    """Whole sequences on this device."""

    is_first = True

    def prefix_sums(self, channels: Tensor, cu_seqlens: Tensor) -> PrefixSums:
        """See `Scan.prefix_sums`."""
        check_length(channels.shape[1])
        inclusive, totals = segment_cumsum(to_fixed(channels), cu_seqlens)
        return PrefixSums(from_fixed(inclusive), from_fixed(totals))

    def sequence_ids(self, cu_seqlens: Tensor) -> Tensor:
        """See `Scan.sequence_ids`."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
        return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)
