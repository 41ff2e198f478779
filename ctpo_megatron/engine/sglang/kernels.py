"""Functions that numba compiles for decoding on CPUs in float32: attention in place and rotary embedding.

Attention reads keys and values where they lie in the KV cache, each once: nothing is gathered, copied or padded. Tensors come as
addresses (`addresses`); each is contiguous unless a stride of its rows comes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from ctpo_megatron.kernels.compiled import compiled
from ctpo_megatron.kernels.cpu import addresses, softmax
from ctpo_megatron.kernels.cpu import lanes as simd
from ctpo_megatron.kernels.cpu.addresses import floats, integers, table
from ctpo_megatron.kernels.cpu.lanes import LANES, lanes
from ctpo_megatron.kernels.cpu.softmax import weigh

_floats, _address, _count = types.float32[::1], types.int64, types.intp
_ZERO, _ONE = np.float32(0), np.float32(1)
_SOURCES = (__file__, str(addresses.__file__), str(softmax.__file__), str(simd.__file__))
_compiled: Any = {"sources": _SOURCES, "nogil": True, "error_model": "numpy"}


def scratch(heads: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `attention` works in for up to `longest` keys: scores and places of keys.

    There are scores for a multiple of 16 keys for each head, and 16 more.
    """
    width = -(-longest // LANES) * LANES
    return np.empty(heads * (width + LANES), np.float32), np.empty(width, np.int64)


@lru_cache
def attention(dim: int) -> Any:
    """Returns the compiled attention for heads of `dim` numbers, a multiple of 16: one query for each sequence.

    Its arguments: queries [B, heads, dim], of a layer's cache keys and values [slots, key heads, dim] and how many slots; the
    table [requests, longest] int32 with the slots of each request's tokens, and its two sizes; `rows` [B] of the table,
    `lens` [B] tokens of each sequence, B; the scale of scores, `heads`, `key_heads`, answers [B, heads, dim], of `scratch` scores
    and places, and the first and the last sequence but one that it is to compute.
    """
    parts = dim // LANES
    signature = types.void(
        *([_address] * 3 + [_count]),
        *(_address, _count, _count, _address, _address, _count),
        *(types.float32, _count, _count, _address, _floats, types.int64[::1], _count, _count),
    )

    @compiled(signature, **_compiled)
    def attend(
        at_q, at_keys, at_values, slots, at_table, requests, longest, at_rows, at_lens, count_of, scale, heads, key_heads, at_out,
        scores, places, first, last,
    ):  # fmt: skip
        q, out = floats(at_q, count_of * heads * dim), floats(at_out, count_of * heads * dim)
        keys, values = floats(at_keys, slots * key_heads * dim), floats(at_values, slots * key_heads * dim)
        lines, rows, lens = table(at_table, requests, longest), integers(at_rows, count_of), integers(at_lens, count_of)
        width, group = scores.size // heads, heads // key_heads
        for at in range(first, last):
            count, mine = lens[at], at * heads * dim
            blocks = (count + LANES - 1) // LANES
            for place in range(blocks * LANES):  # the last block is filled up with the last key
                places[place] = np.int64(lines[rows[at], min(place, count - 1)]) * (key_heads * dim)
            for block in range(0, blocks * LANES, LANES):
                _ask(keys, places, block + LANES, blocks * LANES, key_heads * dim)
                for head in range(heads):
                    found = _dots(parts, q, mine + head * dim, keys, places, block, head // group * dim)
                    simd.store(scores, head * width + block, simd.multiply(found, simd.splat(scale)))
            for head in range(heads):
                scores[(head + 1) * width - 1] = weigh(scores, head * width, count, blocks * LANES)[1]
                for part in range(0, dim, LANES):
                    simd.store(out, mine + head * dim + part, simd.splat(_ZERO))
            for block in range(0, blocks * LANES, LANES):
                _ask(values, places, block + LANES, blocks * LANES, key_heads * dim)
                for head in range(heads):
                    _mix(parts, out, mine + head * dim, scores, head * width + block, values, places, block, head // group * dim)
            for head in range(heads):
                share = simd.splat(_ONE / scores[(head + 1) * width - 1])
                for part in range(mine + head * dim, mine + (head + 1) * dim, LANES):
                    simd.store(out, part, simd.multiply(simd.load(out, part), share))

    return attend


@compiled(types.void(_floats, types.int64[::1], types.intp, types.intp, types.intp), **_compiled)
def _ask(cache, places, first, end, size):
    """Ask for the `size` numbers at each of the sixteen places from `first` on, where they are before `end`.

    A sequence's tokens lie far apart in the cache, so the processor does not see which it will read next.
    """
    for place in range(first, min(first + LANES, end)):
        for part in range(0, size, LANES):
            simd.fetch(cache, places[place] + part)


@intrinsic(prefer_literal=True)
def _dots(_typing: Any, parts: Any, q: Any, begin: Any, keys: Any, places: Any, first: Any, shift: Any) -> Any:
    """Returns the products of one query, `parts` times sixteen numbers, with the sixteen keys from `places[first]` on.

    The keys are those of the key head at `shift`.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        count, kinds, given = parts.literal_value, signature.args[1:], values[1:]
        query = simd.element(context, builder, kinds[0], given[0], given[1])
        mine = [simd.read(builder, simd.after(builder, query, LANES * part)) for part in range(count)]
        head = simd.element(context, builder, kinds[2], given[2], given[5])
        place = simd.element(context, builder, kinds[3], given[3], given[4])
        rows = []
        for lane in range(LANES):
            key = builder.gep(head, [builder.load(simd.after(builder, place, lane))])
            row = builder.fmul(mine[0], simd.read(builder, key))
            for part in range(1, count):
                row = simd.fused(builder, mine[part], simd.read(builder, simd.after(builder, key, LANES * part)), row)
            rows.append(row)
        return simd.sums(builder, rows)

    return lanes(parts, q, types.intp, keys, places, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def _mix(
    _typing: Any, parts: Any, out: Any, begin: Any, weights: Any, start: Any, cache: Any, places: Any, first: Any, shift: Any
) -> Any:
    """Add to `out[begin:]`, `parts` times sixteen wide, sixteen values from `places[first]` on times their `weights[start:]`."""

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        count, kinds, given = parts.literal_value, signature.args[1:], values[1:]
        answer = simd.element(context, builder, kinds[0], given[0], given[1])
        answers = [simd.after(builder, answer, LANES * part) for part in range(count)]
        found = [simd.read(builder, each) for each in answers]
        weight = simd.element(context, builder, kinds[2], given[2], given[3])
        head = simd.element(context, builder, kinds[4], given[4], given[7])
        place = simd.element(context, builder, kinds[5], given[5], given[6])
        for lane in range(LANES):
            value = builder.gep(head, [builder.load(simd.after(builder, place, lane))])
            share = simd.spread(builder, builder.load(simd.after(builder, weight, lane)))
            for part in range(count):
                here = simd.read(builder, simd.after(builder, value, LANES * part))
                found[part] = simd.fused(builder, share, here, found[part])
        for each, pointer in zip(found, answers, strict=True):
            simd.write(builder, each, pointer)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(parts, out, intp, weights, intp, cache, places, intp, intp), generate


@compiled(types.void(_address, _count, _address, _count, _address, _count, _count, _count, _address), **_compiled)
def rotary(at_x, stride, at_turns, longest, at_positions, tokens, width, dim, at_out):
    """Write into `out` heads [tokens, width] turned by their tokens' positions; rows of `x` are `stride` apart.

    `turns` [longest, dim] has rows of cosines and sines.
    """
    x, out = floats(at_x, (tokens - 1) * stride + width), floats(at_out, tokens * width)
    turns, positions = floats(at_turns, longest * dim), integers(at_positions, tokens)
    half = dim // 2
    for token in range(tokens):
        cosines = positions[token] * dim
        sines = cosines + half
        for head in range(0, width, dim):
            given, made = token * stride + head, token * width + head
            for at in range(half):
                first, second = x[given + at], x[given + half + at]
                out[made + at] = first * turns[cosines + at] - second * turns[sines + at]
                out[made + half + at] = second * turns[cosines + at] + first * turns[sines + at]
