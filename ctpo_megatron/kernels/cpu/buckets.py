"""In which bucket a number lies: a table in place of a logarithm.

Buckets are those of `algorithms.density`: about 0 equally wide, then growing with the value. The table cuts |x| / finest + 1 at
the first four bits of its mantissa; a cell then holds at most one border, and the one comparison with it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numba
import numpy as np

from ctpo_megatron.kernels.cpu.judges import options

OCTAVES, CELLS = 24, 16  # |x| / finest + 1 up to 2**24, each octave in so many cells


Lookup = tuple[np.ndarray, ...]
"""1 / finest [2]; cells [2, OCTAVES * CELLS]; borders [2, buckets]; a number, and its bits as int64."""


def lookup(edges: Sequence[tuple[tuple[float, ...], float]]) -> Lookup:
    """Returns what `bucket_of` looks at, for distributions with these borders of buckets and widths of the finest one."""
    cells, borders = zip(*(tables(of, finest) for of, finest in edges), strict=True)
    floats = np.zeros(1)
    per_nat = np.asarray([1 / finest for _, finest in edges])
    return per_nat, np.stack(cells), np.stack(borders), floats, floats.view(np.int64)


@lru_cache
def tables(edges: tuple[float, ...], finest: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each cell [OCTAVES * CELLS] the bucket of its smallest |x|, 0 the middle one, and the borders to the right.

    `edges` [buckets + 1] are symmetric about 0, in units of nats; the middle bucket is half positive. Raises ValueError where
    a cell would hold two borders.
    """
    borders = np.append(
        np.asarray(edges[len(edges) // 2 :]), np.inf
    )  # the right ends of the positive buckets, from the middle on
    borders[-2] = np.inf  # what lies beyond the last one is in it
    begins = np.array([(1 + cell / CELLS) * 2.0**octave for octave in range(OCTAVES) for cell in range(CELLS)])
    ends = np.append(begins[1:], begins[-1])
    first = np.searchsorted(borders, (begins - 1) * finest * (1 - 1e-12), side="right")
    last = np.searchsorted(borders, (ends - 1) * finest * (1 + 1e-12), side="right")
    if (last - first).max() > 1:
        raise ValueError("the buckets are too narrow for the table")
    # Nothing is beyond NaN, infinity neither. A bound in `bucket_of` would say the same, but make it too large for numba to take
    # it into the loop over tokens, which then takes three times as long.
    borders[-2:] = np.nan
    return first.astype(np.int64), borders


@numba.njit(**options)
def bucket_of(x, which, lookup):
    """The bucket of `x` in the distribution `which`, of those that `lookup` was made for."""
    per_nat, cells, borders, floats, bits = lookup
    size = abs(x)
    floats[0] = size * per_nat[which] + 1.0
    cell = min(max((bits[0] >> 48) - (1023 << 4), 0), OCTAVES * CELLS - 1)
    bucket = cells[which, cell]
    if size >= borders[which, bucket]:
        bucket += 1
    return bucket if x > 0 else -bucket
