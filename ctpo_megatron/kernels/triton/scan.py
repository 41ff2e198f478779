"""A scan's local part: running sums, minima or maxima of contiguous pieces, anew at restarts. One program a piece.

A program carries its result from block to block, so a piece of any length takes one pass over memory. Sums are of int64 fixed
point, hence the bits of the reference (`algorithms.operators`); minima and maxima do not round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SUM, MIN, MAX = 0, 1, 2
BLOCK = 1024


@triton.jit
def _sum(begins_1, x, begins_2, y):
    return begins_1 | begins_2, tl.where(begins_2 != 0, y, x + y)


@triton.jit
def _min(begins_1, x, begins_2, y):
    return begins_1 | begins_2, tl.where(begins_2 != 0, y, tl.minimum(x, y))


@triton.jit
def _max(begins_1, x, begins_2, y):
    return begins_1 | begins_2, tl.where(begins_2 != 0, y, tl.maximum(x, y))


@triton.jit
def _scan(values, restarts, bounds, out, empty, RESTARTS: tl.constexpr, OPERATOR: tl.constexpr, BLOCK: tl.constexpr):
    piece = tl.program_id(0)
    begin, end = tl.load(bounds + piece), tl.load(bounds + piece + 1)
    lane = tl.arange(0, BLOCK)
    nothing = tl.load(empty)
    carry = nothing
    for at in range(begin, end, BLOCK):
        place = at + lane
        here = place < end
        value = tl.load(values + place, mask=here, other=nothing)
        begins = tl.zeros([BLOCK], tl.int32)
        if RESTARTS:
            begins = tl.load(restarts + place, mask=here, other=0).to(tl.int32)
        if OPERATOR == 0:
            begun, run = tl.associative_scan((begins, value), 0, _sum)
            run = tl.where(begun != 0, run, run + carry)
            carry = tl.sum(tl.where(lane == BLOCK - 1, run, 0), 0)
        elif OPERATOR == 1:
            begun, run = tl.associative_scan((begins, value), 0, _min)
            run = tl.where(begun != 0, run, tl.minimum(run, carry))
            carry = tl.min(tl.where(lane == BLOCK - 1, run, nothing), 0)
        else:
            begun, run = tl.associative_scan((begins, value), 0, _max)
            run = tl.where(begun != 0, run, tl.maximum(run, carry))
            carry = tl.max(tl.where(lane == BLOCK - 1, run, nothing), 0)
        tl.store(out + place, run, mask=here)


def piece_scan(operator: int, values: Tensor, bounds: Tensor, restarts: Tensor | None = None, block: int = BLOCK) -> Tensor:
    """Inclusive scan [T] of `values` [T] by SUM (int64), MIN or MAX (floats), anew in each piece and at `restarts` [T] bool.

    `bounds` [M + 1] int64 are the borders of the pieces, on the device of the values. `block`: elements of a step, a power of 2.
    Raises ValueError for sums of other numbers than int64.
    """
    if operator == SUM and values.dtype != torch.int64:
        raise ValueError(f"sums are of fixed point, int64, not of {values.dtype}: they would depend on their order")
    out = torch.empty_like(values)
    pieces = bounds.numel() - 1
    if pieces and values.numel():
        empty = values.new_full((1,), {SUM: 0, MIN: float("inf"), MAX: -float("inf")}[operator])
        flags = values if restarts is None else restarts.view(torch.uint8)  # never read where there are none
        _scan[(pieces,)](values, flags, bounds, out, empty, RESTARTS=restarts is not None, OPERATOR=operator, BLOCK=block)
    return out
