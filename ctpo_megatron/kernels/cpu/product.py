"""Small products of matrices in float32, for functions that numba compiles: a tile of 8 rows by 16 or 32 columns at a time.

What is summed stays in registers, so every number that is read takes part in several multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ctpo_megatron.kernels.cpu import lanes as simd
from ctpo_megatron.kernels.cpu.lanes import LANES

ROWS = 8
COLUMNS = 2 * LANES


def _held() -> tuple[int, int]:
    """Rows, and times sixteen columns, whose sums fit into registers: 32 of sixteen float32 with AVX-512, else 16 of eight."""
    return (8, 2) if binding.get_host_cpu_features().get("avx512f", False) else (4, 1)


@intrinsic(prefer_literal=True)
def tile(
    _typing: Any, wide: Any, adds: Any, a: Any, at_a: Any, a_row: Any, a_step: Any, b: Any, at_b: Any, b_row: Any, count: Any,
    c: Any, at_c: Any, c_row: Any,
) -> Any:  # fmt: skip
    """Put into 8 rows of `c`, each `wide` times sixteen wide, the sums over k < `count` of a[row, k] * b[k]; `adds`: add them.

    a[row, k] lies at `at_a + row * a_row + k * a_step`, row k of b at `at_b + k * b_row`, a row of c at `at_c + row * c_row`.
    """
    parts, keeps, (most_rows, most_parts) = wide.literal_value, adds.literal_value, _held()

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        _, _, a, at_a, a_row, a_step, b, at_b, b_row, count, c, at_c, c_row = values
        a, b, c = (
            simd.element(context, builder, signature.args[place], array, at)
            for place, array, at in ((2, a, at_a), (6, b, at_b), (10, c, at_c))
        )
        for row in range(0, ROWS, most_rows):
            for part in range(0, parts, most_parts):
                rows = [builder.mul(step, ir.Constant(step.type, row)) for step in (a_row, c_row)]
                corner_a, corner_c = builder.gep(a, [rows[0]]), simd.after(builder, builder.gep(c, [rows[1]]), LANES * part)
                corner_b = simd.after(builder, b, LANES * part)
                shape = (most_rows, min(most_parts, parts - part))
                _sum(builder, shape, keeps, (corner_a, a_row, a_step), (corner_b, b_row), count, (corner_c, c_row))
        return context.get_dummy_value()

    intp = types.intp
    return types.void(wide, adds, a, intp, intp, intp, b, intp, intp, intp, c, intp, intp), generate


def _sum(
    builder: Any, shape: tuple[int, int], keeps: int, a: Sequence[Any], b: Sequence[Any], count: Any, c: Sequence[Any]
) -> None:
    """The sums of a part of a tile, `shape`: rows, and times sixteen columns. `a`, `b`, `c`: a pointer, and what lies between."""
    zero = ir.Constant(ir.VectorType(ir.FloatType(), LANES), [0.0] * LANES)
    begun = [builder.gep(c[0], [builder.mul(c[1], ir.Constant(c[1].type, row))]) for row in range(shape[0])]
    places = [[simd.after(builder, each, LANES * part) for part in range(shape[1])] for each in begun]
    sums = [[cgutils.alloca_once(builder, zero.type) for _ in line] for line in places]
    for value in (value for held in sums for value in held):
        builder.store(zero, value)
    with cgutils.for_range(builder, count) as loop:
        row = builder.gep(b[0], [builder.mul(loop.index, b[1])])
        those = [simd.read(builder, simd.after(builder, row, LANES * part)) for part in range(shape[1])]
        column = builder.gep(a[0], [builder.mul(loop.index, a[2])])
        for number, held in enumerate(sums):
            factor = builder.load(builder.gep(column, [builder.mul(a[1], ir.Constant(a[1].type, number))]))
            for value, that in zip(held, those, strict=True):
                builder.store(simd.fused(builder, simd.spread(builder, factor), that, builder.load(value)), value)
    for line, held in zip(places, sums, strict=True):
        for place, value in zip(line, held, strict=True):
            found = builder.load(value)  # what was there is added last: a long sum is one of short ones, which rounds less
            simd.write(builder, builder.fadd(simd.read(builder, place), found) if keeps else found, place)
