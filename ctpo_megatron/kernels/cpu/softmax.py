"""Scores to weights, for functions that numba compiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from ctpo_megatron.kernels.compiled import compiled
from ctpo_megatron.kernels.cpu import lanes as simd
from ctpo_megatron.kernels.cpu.lanes import LANES

_LOWEST, _ZERO = np.float32(-np.inf), np.float32(0)
_compiled: Any = {"sources": (__file__, str(simd.__file__)), "nogil": True, "error_model": "numpy"}


@compiled(types.UniTuple(types.float32, 2)(types.float32[::1], types.intp, types.intp, types.intp), **_compiled)
def weigh(scores, begin, count, width):
    """(largest of `count` scores, sum of e^(score - largest)); these replace the scores, and zeros what follows up to `width`."""
    end = begin + (count - 1) // LANES * LANES
    left = begin + count - end
    simd.store(scores, end, simd.keep(simd.load(scores, end), left, _LOWEST))
    most = simd.load(scores, begin)
    for at in range(begin + LANES, end + 1, LANES):
        most = simd.larger(most, simd.load(scores, at))
    largest = simd.largest(most)
    least, everything = simd.splat(-largest), simd.splat(_ZERO)
    for at in range(begin, end + 1, LANES):
        weights = simd.exp(simd.add(simd.load(scores, at), least))
        if at == end:
            weights = simd.keep(weights, left, _ZERO)
        simd.store(scores, at, weights)
        everything = simd.add(everything, weights)
    for at in range(end + LANES, begin + width, LANES):
        simd.store(scores, at, simd.splat(_ZERO))
    return largest, simd.total(everything)
