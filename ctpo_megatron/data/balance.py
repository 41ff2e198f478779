"""Which samples make up which micro-batch of which data-parallel rank.

A plan is [dp][n][members]: indices of samples. For any lengths of at most `capacity` tokens:
- every sample is in exactly one micro-batch;
- every rank gets the same number n of micro-batches, a multiple of `multiple`; it is the smallest one that the filling below
  finds. Some are empty only where it finds no other way to that number;
- a micro-batch has at most `capacity` tokens;
- the n-th micro-batches of the ranks are neighbours in cost, so ranks that meet in every layer (experts) wait little;
- the same input gives the same plan.

The cost of a sequence of L tokens is L + attention_weight * L^2: linear layers, and attention within the sequence. With weight 0
tokens are balanced. Imbalance is the largest cost of a rank over the mean of all ranks, minus 1. Micro-batches are filled by the
LPT rule of scheduling (Graham 1969): the costliest sample first, each into the cheapest micro-batch that has room. They are
dealt to ranks in rounds, from the costliest down: within a round the costliest goes to the rank that has least so far, and
afterwards the ranks with most and least swap within a round while that brings them together. So by tokens two ranks differ by no
more than two micro-batches do, that is by no more than the longest sample.

Groups of samples are not kept together. Nothing asks for it: advantages are found before, and every aggregation of token losses
is a weight per sequence that is found over the whole optimizer step (algorithms/aggregation.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NEARER = 0.01  # of the gap between two ranks, that a swap has to take away


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def plan_micro_batches(
    lengths: Sequence[int], *, capacity: int, dp: int, multiple: int = 1, attention_weight: float = 0.0
) -> list[list[list[int]]]:
    """The plan for samples of these lengths, in tokens; see the module's docstring.

    Raises ValueError where a sample is longer than `capacity`.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if tokens.size and tokens.max() > capacity:
        raise ValueError(f"a sample of {tokens.max()} tokens; a micro-batch holds {capacity}")
    costs = tokens + attention_weight * tokens.astype(np.float64) ** 2
    count = round_up(max(1, -(-int(tokens.sum()) // (capacity * dp))), multiple)
    while (found := _fill(tokens, costs, capacity, count * dp)) is None:
        count += multiple
    return _deal(*found, dp)


def _fill(
    tokens: NDArray[np.int64], costs: NDArray[np.float64], capacity: int, count: int
) -> tuple[list[list[int]], NDArray[np.float64]] | None:
    """`count` micro-batches and their costs, or None where none has room for the next sample."""
    bins: list[list[int]] = [[] for _ in range(count)]
    held, spent = np.zeros(count, np.int64), np.zeros(count)
    for index in np.argsort(-costs, kind="stable").tolist():
        chosen = int(np.where(held + tokens[index] <= capacity, spent, np.inf).argmin())
        if held[chosen] + tokens[index] > capacity:
            return None
        bins[chosen].append(index)
        held[chosen] += tokens[index]
        spent[chosen] += costs[index]
    return bins, spent


def _deal(bins: list[list[int]], costs: NDArray[np.float64], dp: int) -> list[list[list[int]]]:
    """[dp][n][members], in rounds of `dp` neighbours in cost."""
    order = np.argsort(-costs, kind="stable")
    totals = np.zeros(dp)
    dealt = order.reshape(-1, dp)  # [n, dp], by and by the number of each rank's micro-batch
    for numbers in dealt:
        takers = np.argsort(totals, kind="stable")
        totals[takers] += costs[numbers]
        numbers[takers] = numbers.copy()
    _swap(dealt, costs)
    return [[sorted(bins[number]) for number in mine] for mine in dealt.T.tolist()]


def _swap(dealt: NDArray[np.int64], costs: NDArray[np.float64]) -> None:
    """Swap micro-batches of one round [n, dp] between the ranks with most and least cost, in place, while they come closer."""
    totals = costs[dealt].sum(0)
    while True:
        most, least = int(totals.argmax()), int(totals.argmin())
        gap = totals[most] - totals[least]
        moved = costs[dealt[:, most]] - costs[dealt[:, least]]  # by a swap in each round
        left = np.abs(gap - 2 * moved)
        chosen = int(left.argmin())
        if left[chosen] > (1 - NEARER) * gap or gap == 0:
            return
        dealt[chosen, [most, least]] = dealt[chosen, [least, most]]
        totals[most] -= moved[chosen]
        totals[least] += moved[chosen]
