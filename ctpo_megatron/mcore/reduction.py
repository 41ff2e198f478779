"""Statistics of a loss over micro-batches and ranks, on their way from the device to values on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.algorithms import Stats
from ctpo_megatron.record.values import Max, Mean, Min, Number, Sum, Values


@dataclass(frozen=True, slots=True)
class Measured:
    """Numbers [n] on the device that are the same on every rank already, and their names; likewise `vectors` of them."""

    names: list[str] = field(default_factory=list)
    numbers: Tensor = field(default_factory=lambda: torch.zeros(0))
    vectors: dict[str, Tensor] = field(default_factory=dict)


def reduce_stats(per_micro_batch: Sequence[Stats], group: dist.ProcessGroup, measured: Measured) -> Values:
    """The statistics over all micro-batches and all ranks of `group`, the same on every rank.

    One all-reduce for what adds up, one for extremes where there are any, and one wait for the device: `measured` rides along and
    comes out as means. All micro-batches and ranks have the same names and shapes. Collective.
    """
    first = _in_order(per_micro_batch[0])
    total = torch.stack([_joined(_added(stats, first)) for stats in per_micro_batch]).sum(0)
    dist.all_reduce(total, group=group)
    found = [total]
    if first.maxima or first.minima:
        largest = torch.stack([_joined(_largest(stats, first)) for stats in per_micro_batch]).amax(0)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        found.append(largest)
    found += [measured.numbers.to(total), *(vector.to(total) for vector in measured.vectors.values())]
    rest = iter(torch.cat(found).tolist())  # the one host sync of a step
    values = _values(first, rest) | once(dict(zip(measured.names, islice(rest, len(measured.names)), strict=True)))
    return values | {name: Mean(_taken(rest, vector)) for name, vector in measured.vectors.items()}


def _in_order(stats: Stats) -> Stats:
    """The same statistics, each kind in the order of its names: no rank may depend on the order in which another found them."""
    means = dict(sorted(stats.means.items()))
    sums, maxima, minima = (dict(sorted(kind.items())) for kind in (stats.sums, stats.maxima, stats.minima))
    return Stats(sums, means, maxima, minima)


def _added(stats: Stats, like: Stats) -> list[Tensor]:
    """What adds up, in the order of the names of `like`."""
    weighted = [part for name in like.means for part in stats.means[name]]
    return [*(stats.sums[name] for name in like.sums), *weighted]


def _largest(stats: Stats, like: Stats) -> list[Tensor]:
    """What is the largest of all; a minimum is the negative of the largest negative."""
    return [*(stats.maxima[name] for name in like.maxima), *(-stats.minima[name] for name in like.minima)]


def _joined(tensors: list[Tensor]) -> Tensor:
    """All numbers of the tensors in one row, float64."""
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def _values(like: Stats, rest: Iterator[float]) -> Values:
    """The values whose numbers come next, in the order of `_added` and `_largest`."""
    values: Values = {name: Sum(_taken(rest, tensor)) for name, tensor in like.sums.items()}
    values |= {name: Mean(_taken(rest, mean.total), _taken(rest, mean.weight)) for name, mean in like.means.items()}
    values |= {name: Max(_taken(rest, tensor)) for name, tensor in like.maxima.items()}
    values |= {name: Min(-_taken(rest, tensor)) for name, tensor in like.minima.items()}
    return values


def _taken(rest: Iterator[float], like: Tensor) -> Number:
    """The next numbers: one for a scalar, a vector for a vector."""
    return np.array([next(rest) for _ in range(like.numel())]) if like.dim() else next(rest)


def once(numbers: Mapping[str, float]) -> Values:
    """Numbers of one optimizer step, of which several steps report the mean."""
    return {name: Mean(number) for name, number in numbers.items()}
