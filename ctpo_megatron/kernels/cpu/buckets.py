"""In which bucket a number lies: a table in place of a logarithm.

Buckets are those of `algorithms.density`: about 0 equally wide, then growing with the value. The table cuts |x| / finest + 1 at
the first four bits of its mantissa; a cell then holds at most one border, and the one comparison with it is exact.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np

from ctpo_megatron.kernels.cpu.judges import compiled

OCTAVES, CELLS = 24, 16  # |x| / finest + 1 up to 2**24, each octave in so many cells


@lru_cache
def tables(edges: tuple[float, ...], finest: float) -> Any:
    """Returns for each cell [OCTAVES * CELLS] the bucket of its smallest |x| among those of positive numbers, and the borders.

    `edges` [buckets + 1] are symmetric about 0, in units of nats; the middle bucket is half positive. Raises ValueError where
    a cell would hold two borders.
    """
    borders = np.append(np.asarray(edges[len(edges) // 2 :]), np.inf)  # the right ends of the positive buckets, from the middle on
    borders[-2] = np.inf  # what lies beyond the last one is in it
    begins = np.array([(1 + cell / CELLS) * 2.0**octave for octave in range(OCTAVES) for cell in range(CELLS)])
    ends = np.append(begins[1:], begins[-1])
    first = np.searchsorted(borders, (begins - 1) * finest * (1 - 1e-12), side="right")
    last = np.searchsorted(borders, (ends - 1) * finest * (1 + 1e-12), side="right")
    if (last - first).max() > 1:
        raise ValueError("the buckets are too narrow for the table")
    return first.astype(np.int64), borders


@numba.njit(**compiled)
def bucket_of(x, finest, first, borders, middle, scratch):
    """The bucket of `x`; `scratch` [1] float64 is room to look at its bits."""
    size = abs(x)
    scratch[0] = size / finest + 1.0
    place = (scratch.view(np.int64)[0] >> 48) - (1023 << 4)
    cell = min(max(place, 0), len(first) - 1)
    bucket = first[cell]
    if size >= borders[bucket]:
        bucket += 1
    return middle + bucket if x > 0 else middle - bucket
