"""`cpu.tokens` on torch tensors: which threads take which sequences, and their results as one.

Sequences are put into shares that do not depend on the number of threads, and shares are added in order, so neither do results.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctpo_megatron.kernels.cpu import tokens as k
from ctpo_megatron.kernels.cpu.buckets import lookup
from ctpo_megatron.kernels.numbers import DECILES, MAX_ABS, MAX_LOG_RATIO, TINY

SHARE = 2**16  # tokens that one thread takes at a time, or a whole sequence


@dataclass(frozen=True, slots=True)
class How:
    """What to compute: an objective of `judges` with its options, and a correction of `tokens`."""

    kind: int
    options: tuple[float, ...]
    measure: int = 0  # divergence
    level: int = k.LEVEL_NONE
    manner: int = k.TRUNCATE
    low: float = 0.0  # the correction's bounds
    high: float = 0.0
    density: bool = True  # whether log-ratios are put into buckets


@dataclass(frozen=True, slots=True)
class Found:
    """What one pass found. Where a thing was not asked for, it is empty."""

    value: Tensor  # [T], loss
    slope: Tensor  # [T], its derivative by logp
    held: Tensor  # [T], what was clipped or judged
    fates: Tensor  # [T] uint8, bits of `judges`
    lengths: Tensor  # [N] float64, unmasked tokens
    signs: Tensor  # [N] float64, sum of the signs of the advantages
    sums: Tensor  # [SUMS] float64, see `tokens`
    counts: Tensor  # [COUNTS] int64


def shares(bounds: np.ndarray, size: int = SHARE) -> list[tuple[int, int]]:
    """Runs (first, last) of the sequences with borders `bounds` [N + 1], each of at least `size` tokens but the last."""
    found, first = [], 0
    for last in range(1, len(bounds)):
        if bounds[last] - bounds[first] >= size or last == len(bounds) - 1:
            found.append((first, last))
            first = last
    return found


def judge(
    how: How,
    *,
    streams: Sequence[Tensor],
    mask: Tensor,
    cu_seqlens: Tensor,
    restarts: Tensor | None,
    edges: Sequence[tuple[tuple[float, ...], float]],
    record: bool,
) -> Found:
    """One pass over packed sequences on the CPU, by torch's number of threads.

    Args:
        streams: logp, anchor, old_logp, rollout_logp, advantages, [T] each, of one number format.
        mask, restarts: [T] bool. cu_seqlens: [N + 1].
        edges: for both distributions of log-ratios the borders of their buckets and the width of the finest.
        record: whether `held` and `fates` are wanted.
    """
    arrays = tuple(stream.detach().contiguous().numpy() for stream in streams)
    dtype, size = arrays[0].dtype, arrays[0].size
    bounds = cu_seqlens.numpy().astype(np.int64)
    told = (how.kind, np.asarray(how.options, dtype), how.measure, how.level, how.manner, how.density)
    consts = np.asarray([1, MAX_ABS, MAX_LOG_RATIO, TINY, 1 - TINY, how.low, how.high, DECILES, np.inf], dtype)
    seen = size if record else 0
    out = (np.empty(size, dtype), np.empty(size, dtype), np.zeros(seen, dtype), np.zeros(seen, np.uint8))
    lengths, signs = np.zeros(len(bounds) - 1), np.zeros(len(bounds) - 1)
    parts = shares(bounds)
    sums, counts = np.zeros((len(parts), k.SUMS)), np.zeros((len(parts), k.COUNTS), np.int64)
    begun = np.empty(0, np.bool_) if restarts is None else restarts.contiguous().numpy()
    counted = mask.contiguous().numpy()

    def take(part: int) -> None:
        first, last = parts[part]
        k.judge(
            told, consts, bounds, first, last, arrays, counted, begun, lookup(edges), out, lengths, signs,
            sums[part], counts[part],
        )  # fmt: skip

    _each(take, len(parts), torch.get_num_threads())
    numbers = (*out, lengths, signs, *_joined(sums, counts))
    return Found(*map(torch.from_numpy, numbers))


def _each(take: Any, count: int, threads: int) -> None:
    """Call `take` with 0 to `count` - 1, from up to `threads` threads."""
    if threads > 1 and count > 1:
        with ThreadPoolExecutor(min(threads, count)) as pool:
            list(pool.map(take, range(count)))
    else:
        for part in range(count):
            take(part)


def _joined(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All shares' statistics as one."""
    if not len(sums):
        sums, counts = np.zeros((1, k.SUMS)), np.zeros((1, k.COUNTS), np.int64)
        sums[0, list(k.LARGEST)], sums[0, k.RATIO_MIN], counts[0, k.BAD] = -np.inf, np.inf, -1
    total, number = sums.sum(0), counts.sum(0)
    total[list(k.LARGEST)] = sums[:, list(k.LARGEST)].max(0)
    total[k.RATIO_MIN] = sums[:, k.RATIO_MIN].min()
    first = int((counts[:, k.BAD] >= 0).argmax())  # the first share with a number that is not finite, or any without one
    number[[k.BAD, k.BAD_PLACE]] = counts[first, [k.BAD, k.BAD_PLACE]]
    return total, number
