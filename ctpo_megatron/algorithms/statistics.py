"""Statistics of a loss, on the device, sorted by how they combine over parts, micro-batches and ranks.

`record.values` has their counterparts on the host, under the same names; those without a slash are the `train/` metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ctpo_megatron.algorithms.prepare import Prepared, Streams
from ctpo_megatron.algorithms.scan import Scan
from ctpo_megatron.algorithms.tokens import TokenLoss, Tokens
from ctpo_megatron.errors import NonFiniteError
from ctpo_megatron.record.values import Value, scalar

NONFINITE = "nonfinite"  # the smallest place of a token without a finite log-prob
POSITIONS = 2**30  # a non-finite token's place is coded as sequence * 2**30 + position, exact in float64


class Weighted(NamedTuple):
    """A mean as its two sums, of one shape."""

    total: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True)
class Stats:
    """Named scalars and vectors. A name stands in one of the four; every micro-batch of a step has the same names."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Weighted] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    minima: dict[str, Tensor] = field(default_factory=dict)

    def __or__(self, other: Stats) -> Stats:
        """Statistics of the same tokens side by side."""
        return Stats(self.sums | other.sums, self.means | other.means, self.maxima | other.maxima, self.minima | other.minima)

    def merge(self, other: Stats) -> Stats:
        """Statistics of other tokens under the same names, both parts as one."""
        return Stats(
            {name: value + other.sums[name] for name, value in self.sums.items()},
            {name: Weighted(*map(torch.add, value, other.means[name])) for name, value in self.means.items()},
            {name: torch.maximum(value, other.maxima[name]) for name, value in self.maxima.items()},
            {name: torch.minimum(value, other.minima[name]) for name, value in self.minima.items()},
        )


def merge(parts: Iterable[Stats]) -> Stats:
    """Statistics of at least one part as one."""
    return reduce(Stats.merge, parts)


def token_stats(tokens: Tokens, out: TokenLoss) -> Stats:
    """Clip fractions and ratios of some tokens of a micro-batch."""
    mask, log_ratio = tokens.mask, out.log_ratio.detach()
    ratio = torch.exp(torch.where(mask, log_ratio, -torch.inf))
    high, low = out.high & mask, out.low & mask
    dual = torch.zeros_like(mask) if out.dual is None else out.dual & mask
    count = _count(mask)
    totals = {
        "clip_high": _count(high),
        "clip_low": _count(low),
        "clip_dual": _count(dual),
        "clip_fraction": _count(high | low | dual),
        "ratio": ratio.sum(dtype=torch.float64),
        "ratio_sq": ratio.square().sum(dtype=torch.float64),
        "kl_old": -tokens.log_ratio.detach().sum(dtype=torch.float64),
        "log_ratio_sq": torch.where(mask, log_ratio, 0.0).square_().sum(dtype=torch.float64),
    }
    if out.band is not None:
        totals["band"] = torch.where(mask, out.band, 0.0).sum(dtype=torch.float64)
    return Stats(
        sums={"tokens": count},
        means={name: Weighted(total, count) for name, total in totals.items()},
        maxima={"ratio_max": largest(torch.where(mask, ratio, -torch.inf))},
        minima={"ratio_min": -largest(torch.where(mask, -ratio, -torch.inf))},
    )


def input_stats(streams: Streams, ready: Prepared, sequence_ids: Tensor | None, scan: Scan) -> Stats:
    """Where the first log-prob among the inputs is that is not finite."""
    total = streams.logp.detach() + streams.old_logp  # finite only if both are
    if streams.rollout_logp is not None:
        total += streams.rollout_logp
    if sequence_ids is None:
        sequence_ids = torch.arange(ready.lengths.numel(), device=streams.mask.device)
    return nonfinite_stats(~torch.isfinite(total) & streams.mask, ready.place, sequence_ids, streams.cu_seqlens, scan)


def nonfinite_stats(bad: Tensor, position: Tensor, sequence_ids: Tensor, cu_seqlens: Tensor, scan: Scan) -> Stats:
    """Where the first of the `bad` tokens [T] is: its sequence's number and its `position` [T] among the policy's tokens."""
    if not bad.numel():
        return Stats(minima={NONFINITE: position.new_full((), torch.inf, dtype=torch.float64)})
    first = bad.to(torch.uint8).argmax().unsqueeze(0)
    sequence = scan.per_token(sequence_ids.to(torch.int32), cu_seqlens, bad.numel())
    place = sequence[first].double() * POSITIONS + position[first]
    return Stats(minima={NONFINITE: torch.where(bad[first], place, torch.inf).squeeze(0)})


def raise_if_nonfinite(stats: Stats | Mapping[str, Value]) -> None:
    """Raise NonFiniteError when a log-prob of the policy's own tokens was NaN or infinite; reads `stats`, so it synchronises.

    `policy_loss` itself never looks at values on the host; a caller that applies its gradient calls this first, with the
    statistics of the loss or what they were reduced to.
    """
    if isinstance(stats, Stats):
        place = float(stats.minima[NONFINITE]) if NONFINITE in stats.minima else torch.inf
    else:
        place = scalar(stats[NONFINITE]) if NONFINITE in stats else torch.inf
    if place < torch.inf:
        sequence, position = divmod(int(place), POSITIONS)
        raise NonFiniteError(
            f"the log-prob of a token that the policy wrote is NaN or infinite: sequence {sequence}, policy token {position} "
            "(sequences of a rollout batch count from 0, tokens from 1). Nothing was updated. Usual causes: a learning rate that "
            "is too high, a masked-out label, overflow in reduced precision.",
            sequence=sequence,
        )


def _count(mask: Tensor) -> Tensor:
    return mask.sum().double()


def largest(values: Tensor) -> Tensor:
    """The largest of `values`, in float64; -inf of none."""
    return values.amax().double() if values.numel() else values.new_full((), -torch.inf, dtype=torch.float64)
