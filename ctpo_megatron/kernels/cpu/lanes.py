"""Sixteen float32 at once, for functions that numba compiles: `load`, `store`, `splat`, `fma`, `exp` and others on `lanes`.

numba leaves it to LLVM to find loops that can go over several numbers at once; loops through a KV cache it does not find. LLVM
turns sixteen lanes into one register of AVX-512, two of AVX2, four of NEON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 16
_INDEX = ir.IntType(64)
_INT = ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INT, LANES)
_LEAST, _MOST = -87.0, 88.0  # e to the power of less or more is no normal float32
_TO_INTEGER = 1.5 * 2**23  # added to a float32, it leaves the nearest integer in the lowest bits

Builder = Any  # llvmlite.ir.IRBuilder
Value = Any  # llvmlite.ir.Value


class _Lanes(types.Type):
    """Numba's type of sixteen float32."""

    def __init__(self) -> None:
        super().__init__("float32x16")


lanes = _Lanes()


@register_model(_Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Lanes) -> None:
        super().__init__(manager, kind, _FLOATS)


def element(context: Any, builder: Builder, kind: Any, array: Value, index: Value) -> Value:
    """Returns a pointer to `array[index]`."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def after(builder: Builder, pointer: Value, count: int) -> Value:
    """Returns the pointer `count` elements behind `pointer`."""
    return builder.gep(pointer, [ir.Constant(_INDEX, count)])


def read(builder: Builder, pointer: Value) -> Value:
    """Returns the lanes at a pointer to float32."""
    return builder.load(builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)


def write(builder: Builder, value: Value, pointer: Value) -> None:
    """Put lanes at a pointer to float32."""
    builder.store(value, builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)


def spread(builder: Builder, number: Value) -> Value:
    """Returns a float32 in all lanes."""
    return _spread(builder, number, _FLOATS)


def fused(builder: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, rounded once."""
    return _call(builder, "llvm.fma.v16f32", x, y, z)


def sums(builder: Builder, rows: Sequence[Value]) -> Value:
    """Returns lanes of which the i-th is the sum over the i-th of sixteen rows: four rounds, in each two rows become one."""
    step = 1
    while len(rows) > 1:
        low = [at // (2 * step) * (2 * step) + at % step + (LANES if at & step else 0) for at in range(LANES)]
        halves = [ir.Constant(_INTS, low), ir.Constant(_INTS, [at + step for at in low])]
        rows = [
            builder.fadd(*(builder.shuffle_vector(rows[at], rows[at + 1], half) for half in halves))
            for at in range(0, len(rows), 2)
        ]
        step *= 2
    return rows[0]


def _spread(builder: Builder, number: Value, kind: Any) -> Value:
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_INTS, [0] * LANES))


def _all(number: float) -> Value:
    return ir.Constant(_FLOATS, [number] * LANES)


def _call(builder: Builder, name: str, *values: Value) -> Value:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(values))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _larger(builder: Builder, x: Value, y: Value) -> Value:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _folded(builder: Builder, value: Value, fold: Callable[[Value, Value], Value]) -> Value:
    width = LANES
    while width > 1:
        width //= 2
        upper = [*range(width, 2 * width), *[0] * (LANES - width)]
        value = fold(value, builder.shuffle_vector(value, value, ir.Constant(_INTS, upper)))
    return builder.extract_element(value, ir.Constant(_INT, 0))


def _exp(builder: Builder, x: Value) -> Value:
    """e^x = 2^n e^f with |f| <= ln 2 / 2, and e^f by the polynomial of Cephes' expf: within 2 units of the last place.

    Beyond what float32 can hold it is e^-87 and e^88; of what is no number it is none.
    """
    x = builder.select(builder.fcmp_ordered("<", x, _all(_LEAST)), _all(_LEAST), x)
    x = builder.select(builder.fcmp_ordered(">", x, _all(_MOST)), _all(_MOST), x)
    shifted = fused(builder, x, _all(1.4426950408889634), _all(_TO_INTEGER))
    power = builder.fsub(shifted, _all(_TO_INTEGER))
    rest = fused(builder, power, _all(-0.693359375), x)  # ln 2 in two parts, the first of which has few bits
    rest = fused(builder, power, _all(2.12194440e-4), rest)
    value = _all(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        value = fused(builder, value, rest, _all(factor))
    value = builder.fadd(fused(builder, builder.fmul(rest, rest), value, rest), _all(1.0))
    exponent = builder.shl(builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [23] * LANES))
    biased = builder.add(exponent, ir.Constant(_INTS, [127 << 23] * LANES))
    return builder.fmul(value, builder.bitcast(biased, _FLOATS))


def _operation(emit: Callable[..., Value], result: Any = lanes) -> Any:
    """An operation on lanes as a function that compiled functions can call; `emit` gets the builder and as many values."""

    def generate(_context: Any, builder: Builder, _signature: Any, values: Sequence[Value]) -> Value:
        return emit(builder, *values)

    def one(_typing: Any, x: Any) -> Any:
        return result(lanes), generate

    def two(_typing: Any, x: Any, y: Any) -> Any:
        return result(lanes, lanes), generate

    def three(_typing: Any, x: Any, y: Any, z: Any) -> Any:
        return result(lanes, lanes, lanes), generate

    return intrinsic((one, two, three)[emit.__code__.co_argcount - 2])


add = _operation(lambda builder, x, y: builder.fadd(x, y))
subtract = _operation(lambda builder, x, y: builder.fsub(x, y))
multiply = _operation(lambda builder, x, y: builder.fmul(x, y))
divide = _operation(lambda builder, x, y: builder.fdiv(x, y))
larger = _operation(_larger)
fma = _operation(fused)
exp = _operation(_exp)
total = _operation(lambda builder, x: _folded(builder, x, builder.fadd), types.float32)
largest = _operation(lambda builder, x: _folded(builder, x, lambda y, z: _larger(builder, y, z)), types.float32)


@intrinsic
def load(_typing: Any, array: Any, index: Any) -> Any:
    """Returns the lanes `array[index : index + 16]`."""

    def generate(context: Any, builder: Builder, signature: Any, values: Sequence[Value]) -> Value:
        return read(builder, element(context, builder, signature.args[0], *values))

    return lanes(array, types.intp), generate


@intrinsic
def store(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Put lanes into `array[index : index + 16]`."""

    def generate(context: Any, builder: Builder, signature: Any, values: Sequence[Value]) -> Value:
        write(builder, values[2], element(context, builder, signature.args[0], *values[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), generate


@intrinsic
def fetch(_typing: Any, array: Any, index: Any) -> Any:
    """Ask for `array[index : index + 16]` to be brought near, without waiting for it."""

    def generate(context: Any, builder: Builder, signature: Any, values: Sequence[Value]) -> Value:
        pointer, number = ir.IntType(8).as_pointer(), [_INT] * 3
        kind = ir.FunctionType(ir.VoidType(), [pointer, *number])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        place = builder.bitcast(element(context, builder, signature.args[0], *values), pointer)
        builder.call(call, [place, _INT(0), _INT(3), _INT(1)])  # to read, how near, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def splat(_typing: Any, number: Any) -> Any:
    """`number` in all lanes."""
    return lanes(types.float32), lambda _context, builder, _signature, values: spread(builder, *values)


@intrinsic
def keep(_typing: Any, value: Any, count: Any, other: Any) -> Any:
    """Returns the first `count` lanes of `value`, and `other` in the rest."""

    def generate(_context: Any, builder: Builder, _signature: Any, values: Sequence[Value]) -> Value:
        value, count, other = values
        kept = _spread(builder, builder.trunc(count, _INT), _INTS)
        mine = builder.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), kept)
        return builder.select(mine, value, spread(builder, other))

    return lanes(lanes, types.intp, types.float32), generate
