"""Causal attention over packed sequences in float32, with rotary embedding and gradients, in functions that numba compiles.

A unit is what one thread computes: a key head of a sequence and of those that share their beginning with it. Its keys are
gathered once, turned by their positions, and lie in memory both ways round; queries come in blocks of 32. Scores of a block are
held for all keys that its last query may see, no more: half of the rectangle. The backward pass computes them again from the
queries, the keys and the logarithm of each row's sum, as in FlashAttention (arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from ctpo_megatron.kernels.compiled import compiled
from ctpo_megatron.kernels.cpu import lanes as simd
from ctpo_megatron.kernels.cpu import product, softmax
from ctpo_megatron.kernels.cpu.lanes import LANES
from ctpo_megatron.kernels.cpu.product import COLUMNS, ROWS, tile
from ctpo_megatron.kernels.cpu.softmax import weigh

BLOCK = 32  # queries whose scores are held at a time
_SOURCES = (__file__, str(product.__file__), str(softmax.__file__), str(simd.__file__))
_compiled: Any = {"sources": _SOURCES, "nogil": True, "error_model": "numpy"}
_row, _places, _turns = types.float32[::1], types.int64[::1], types.float32[:, :, ::1]
_count, _number = types.intp, types.float32
_pair = types.UniTuple(_count, 2)
_ZERO, _ONE = np.float32(0), np.float32(1)


def scratch_sizes(longest: int, dim: int) -> tuple[int, int]:
    """How many float32 the passes work in, forward and backward, where a sequence has up to `longest` keys of `dim` numbers."""
    width, block = -(-longest // COLUMNS) * COLUMNS, BLOCK * dim
    return 3 * width * dim + BLOCK * width + 2 * block, 6 * width * dim + 2 * BLOCK * width + 3 * block


@compiled(types.void(_row, _count, _row, _count, _count, _turns, _count, _count, _number, _number), **_compiled)
def _turn(to, at, given, begin, dim, turns, half, position, sign, factor):
    """Write the `dim` numbers at `given[begin:]` to `to[at:]`, times `factor`.

    The first 2 * `half` are turned as at `position`, back where `sign` is -1.
    """
    cosines, sines = turns[0, position], turns[1, position]
    whole, times, signed = half // LANES * LANES, simd.splat(factor), simd.splat(sign * factor)
    for c in range(0, whole, LANES):
        x, y = simd.load(given, begin + c), simd.load(given, begin + half + c)
        cosine, sine = simd.multiply(simd.load(cosines, c), times), simd.multiply(simd.load(sines, c), signed)
        simd.store(to, at + c, simd.subtract(simd.multiply(x, cosine), simd.multiply(y, sine)))
        simd.store(to, at + half + c, simd.fma(y, cosine, simd.multiply(x, sine)))
    for c in range(whole, half):
        x, y, cosine, sine = given[begin + c], given[begin + half + c], cosines[c] * factor, sines[c] * sign * factor
        to[at + c] = x * cosine - y * sine
        to[at + half + c] = y * cosine + x * sine
    rest = (2 * half + LANES - 1) // LANES * LANES
    for c in range(2 * half, rest):
        to[at + c] = given[begin + c] * factor
    for c in range(rest, dim, LANES):
        simd.store(to, at + c, simd.multiply(simd.load(given, begin + c), times))


@compiled(types.void(_row, _count, _row, _count, _count, _count, _count), **_compiled)
def _transpose(to, at, given, begin, count, width, dim):
    """Write `count` rows of `dim` numbers as `dim` rows that are `width` long, with zeros behind the last."""
    for c in range(dim):
        for j in range(count):
            to[at + c * width + j] = given[begin + j * dim + c]
        for j in range(count, width):
            to[at + c * width + j] = _ZERO


@compiled(types.void(_row, _count, _count, _count, _count, _number, _number), **_compiled)
def _slopes(work, scores, slopes, count, width, log_sum, common):
    """Scores become weights e^(score - log_sum), slopes weight * (slope - common); from `count` to `width` both are zeros."""
    least, shared, nothing = simd.splat(-log_sum), simd.splat(-common), simd.splat(_ZERO)
    end = (count - 1) // LANES * LANES
    for at in range(0, end + 1, LANES):
        weights = simd.exp(simd.add(simd.load(work, scores + at), least))
        slope = simd.multiply(weights, simd.add(simd.load(work, slopes + at), shared))
        if at == end:
            weights, slope = simd.keep(weights, count - end, _ZERO), simd.keep(slope, count - end, _ZERO)
        simd.store(work, scores + at, weights)
        simd.store(work, slopes + at, slope)
    for at in range(end + LANES, width, LANES):
        simd.store(work, scores + at, nothing)
        simd.store(work, slopes + at, nothing)


@compiled(types.void(_row, _count, _count, _count, _count, _row, _count, _count, _count, _row, _count, _count), **_compiled)
def _times(a, at_a, a_row, a_step, rows, b, at_b, b_row, count, c, at_c, columns):
    """c[row] = sum over k < `count` of a[row, k] * b[k], for `rows` (a multiple of 8) rows of `columns` (of 16)."""
    for row in range(0, rows, ROWS):
        for column in range(0, columns - LANES, COLUMNS):
            tile(
                2, 0, a, at_a + row * a_row, a_row, a_step, b, at_b + column, b_row, count, c, at_c + row * b_row + column, b_row
            )
        if columns % COLUMNS:
            last = columns - LANES
            tile(1, 0, a, at_a + row * a_row, a_row, a_step, b, at_b + last, b_row, count, c, at_c + row * b_row + last, b_row)


@compiled(types.void(_row, _count, _count, _count, _row, _count, _count, _count, _row, _count), **_compiled)
def _add_times(a, at_a, a_step, rows, b, at_b, dim, count, c, at_c):
    """c[row] += sum over k < `count` of a[k, row] * b[k], for `rows` (a multiple of 8) rows of `dim` (of 16) numbers."""
    for row in range(0, rows, ROWS):
        for column in range(0, dim - LANES, COLUMNS):
            tile(2, 1, a, at_a + row, 1, a_step, b, at_b + column, dim, count, c, at_c + row * dim + column, dim)
        if dim % COLUMNS:
            tile(1, 1, a, at_a + row, 1, a_step, b, at_b + dim - LANES, dim, count, c, at_c + row * dim + dim - LANES, dim)


@compiled(types.void(_row, _count, _row, _pair, _count, _count, _count, _turns, _places, _count, _number), **_compiled)
def _queries(work, at, given, strides, head, dim, begin, turns, visible, count, factor):
    """Write `count` queries from row `begin` on to `work[at:]`, turned, times `factor`; zeros behind them, to a multiple of 8."""
    for i in range(count):
        place = (begin + i) * strides[0] + head * strides[1]
        _turn(work, at + i * dim, given, place, dim, turns, turns.shape[2], visible[begin + i] - 1, _ONE, factor)
    for i in range(at + count * dim, at + (count + ROWS - 1) // ROWS * ROWS * dim):
        work[i] = _ZERO


@compiled(types.void(_row, _count, _row, _pair, _count, _count, _turns, _count, _places, _count, _count), **_compiled)
def _keys(work, at, given, strides, head, dim, turns, half, rows, begin, count):
    """Write the keys at `count` rows to `work[at:]`, turned by their places among these. Values: with a `half` of 0."""
    for j in range(count):
        place = rows[begin + j] * strides[0] + head * strides[1]
        _turn(work, at + j * dim, given, place, dim, turns, half, j, _ONE, _ONE)


@compiled(
    types.void(
        *(_row, _row, _row, _row, _row, _pair, _pair, _pair, _pair, _count, _turns, _number),
        *(_places, _places, _places, _places, _places, _places, _count, _count, _row),
    ),
    **_compiled,
)
def forward(
    q, k, v, out, logs, q_strides, k_strides, v_strides, heads, dim, turns, scale, q_bounds, visible, k_bounds, k_rows, order,
    unit_bounds, first, last, work,
):  # fmt: skip
    """Write into `out` [T, heads, dim] what queries see, and into `logs` [T, heads] the logarithm of the sum of e^score.

    Args:
        q, k, v: rows of heads; `strides` from one row and one head to the next.
        heads: (query heads, key heads). turns: [2, longest, half], cosines and sines of positions.
        q_bounds: [N + 1] borders of the sequences' queries. visible: [T] how many keys of its sequence each query sees, ascending
            within a sequence; its position is one less. k_bounds: [N + 1] borders in k_rows, the rows of their keys.
        order, unit_bounds: sequences by units. first, last: units to compute, unit * key heads + key head.
        work: of `scratch_sizes`.
    """
    group = heads[0] // heads[1]
    for unit in range(first, last):
        head_of_keys = unit % heads[1]
        for s in order[unit_bounds[unit // heads[1]] : unit_bounds[unit // heads[1] + 1]]:
            count = k_bounds[s + 1] - k_bounds[s]
            width = (count + COLUMNS - 1) // COLUMNS * COLUMNS
            at_turned, at_v, at_s = width * dim, 2 * width * dim, 3 * width * dim
            at_q = at_s + BLOCK * width
            at_o = at_q + BLOCK * dim
            _keys(work, 0, k, k_strides, head_of_keys, dim, turns, turns.shape[2], k_rows, k_bounds[s], count)
            _transpose(work, at_turned, work, 0, count, width, dim)
            _keys(work, at_v, v, v_strides, head_of_keys, dim, turns, 0, k_rows, k_bounds[s], count)
            for head in range(head_of_keys * group, (head_of_keys + 1) * group):
                for begin in range(q_bounds[s], q_bounds[s + 1], BLOCK):
                    size = min(BLOCK, q_bounds[s + 1] - begin)
                    rows, most = (size + ROWS - 1) // ROWS * ROWS, visible[begin + size - 1]
                    seen = (most + COLUMNS - 1) // COLUMNS * COLUMNS
                    _queries(work, at_q, q, q_strides, head, dim, begin, turns, visible, size, scale)
                    _times(work, at_q, dim, 1, rows, work, at_turned, width, dim, work, at_s, seen)
                    for i in range(size):
                        largest, total = weigh(work, at_s + i * width, visible[begin + i], seen)
                        logs[(begin + i) * heads[0] + head] = largest + np.log(total)
                        work[at_q + i] = _ONE / total  # the queries are done with
                    _times(work, at_s, width, 1, rows, work, at_v, dim, most, work, at_o, dim)
                    for i in range(size):
                        place, share = ((begin + i) * heads[0] + head) * dim, simd.splat(work[at_q + i])
                        for c in range(0, dim, LANES):
                            simd.store(out, place + c, simd.multiply(simd.load(work, at_o + i * dim + c), share))


@compiled(
    types.void(
        *(_row, _pair, _row, _row, _row, _row, _turns, _number, _places, _row, _count, _count, _count, _count, _count, _count),
    ),
    **_compiled,
)
def _block(q, q_strides, out, logs, grad, to_q, turns, scale, visible, work, width, head, heads, dim, begin, size):
    """The backward pass of `size` queries of a head. `work` has the keys, values and their gradients as `backward` lays them."""
    at_s, size_of = 6 * width * dim, width * dim
    at_d = at_s + BLOCK * width
    at_q = at_d + BLOCK * width
    at_g, at_t = at_q + BLOCK * dim, at_q + 2 * BLOCK * dim
    rows, most = (size + ROWS - 1) // ROWS * ROWS, visible[begin + size - 1]
    seen = (most + COLUMNS - 1) // COLUMNS * COLUMNS
    _queries(work, at_q, q, q_strides, head, dim, begin, turns, visible, size, scale)
    for i in range(size):
        work[at_g + i * dim : at_g + (i + 1) * dim] = grad[((begin + i) * heads + head) * dim :][:dim]
    work[at_g + size * dim : at_g + rows * dim] = _ZERO
    _times(work, at_q, dim, 1, rows, work, size_of, width, dim, work, at_s, seen)
    _times(work, at_g, dim, 1, rows, work, 3 * size_of, width, dim, work, at_d, seen)
    for i in range(size):
        place, common = ((begin + i) * heads + head) * dim, simd.splat(_ZERO)
        for c in range(0, dim, LANES):
            common = simd.fma(simd.load(grad, place + c), simd.load(out, place + c), common)
        log_sum = logs[(begin + i) * heads + head]
        _slopes(work, at_s + i * width, at_d + i * width, visible[begin + i], seen, log_sum, simd.total(common))
    _times(work, at_d, width, 1, rows, work, 0, dim, most, work, at_t, dim)
    for i in range(size):
        place = ((begin + i) * heads + head) * dim
        _turn(to_q, place, work, at_t + i * dim, dim, turns, turns.shape[2], visible[begin + i] - 1, -_ONE, scale)
    _add_times(work, at_s, width, (most + ROWS - 1) // ROWS * ROWS, work, at_g, dim, size, work, 5 * size_of)
    _add_times(work, at_d, width, (most + ROWS - 1) // ROWS * ROWS, work, at_q, dim, size, work, 4 * size_of)


@compiled(
    types.void(
        *(_row, _row, _row, _row, _row, _row, _row, _row, _row, _pair, _pair, _pair, _pair, _count, _turns, _number),
        *(_places, _places, _places, _places, _places, _places, _count, _count, _row),
    ),
    **_compiled,
)
def backward(
    q, k, v, out, logs, grad, to_q, to_k, to_v, q_strides, k_strides, v_strides, heads, dim, turns, scale, q_bounds, visible,
    k_bounds, k_rows, order, unit_bounds, first, last, work,
):  # fmt: skip
    """Write into `to_q` [T, heads, dim] the gradient of queries, and add those of keys and values to theirs.

    `to_k`, `to_v`: [rows, key heads, dim]. `grad` is that of `out`, of its shape; for the others see `forward`.
    """
    group = heads[0] // heads[1]
    for unit in range(first, last):
        head_of_keys = unit % heads[1]
        for s in order[unit_bounds[unit // heads[1]] : unit_bounds[unit // heads[1] + 1]]:
            count = k_bounds[s + 1] - k_bounds[s]
            width = (count + COLUMNS - 1) // COLUMNS * COLUMNS
            size_of = width * dim
            _keys(work, 0, k, k_strides, head_of_keys, dim, turns, turns.shape[2], k_rows, k_bounds[s], count)
            _transpose(work, size_of, work, 0, count, width, dim)
            _keys(work, 2 * size_of, v, v_strides, head_of_keys, dim, turns, 0, k_rows, k_bounds[s], count)
            _transpose(work, 3 * size_of, work, 2 * size_of, count, width, dim)
            work[4 * size_of : 6 * size_of] = _ZERO
            for head in range(head_of_keys * group, (head_of_keys + 1) * group):
                for begin in range(q_bounds[s], q_bounds[s + 1], BLOCK):
                    size = min(BLOCK, q_bounds[s + 1] - begin)
                    _block(
                        q, q_strides, out, logs, grad, to_q, turns, scale, visible, work, width, head, heads[0], dim, begin, size
                    )
            for j in range(count):
                place = (k_rows[k_bounds[s] + j] * heads[1] + head_of_keys) * dim
                _turn(work, j * dim, work, 4 * size_of + j * dim, dim, turns, turns.shape[2], j, -_ONE, _ONE)
                for c in range(0, dim, LANES):
                    simd.store(to_k, place + c, simd.add(simd.load(to_k, place + c), simd.load(work, j * dim + c)))
                    more = simd.load(work, 5 * size_of + j * dim + c)
                    simd.store(to_v, place + c, simd.add(simd.load(to_v, place + c), more))
