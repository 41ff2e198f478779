"""Norm and gated activation of rows in float32, forward and backward, in functions that numba compiles.

Tensors come as addresses (`addresses`), contiguous. Each number is read and written once, where torch's own operations make a
pass over memory for every elementary step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from ctpo_megatron.kernels.compiled import compiled
from ctpo_megatron.kernels.cpu import addresses
from ctpo_megatron.kernels.cpu import lanes as simd
from ctpo_megatron.kernels.cpu.addresses import floats
from ctpo_megatron.kernels.cpu.lanes import LANES

_address, _count = types.int64, types.intp
_ZERO, _ONE = np.float32(0), np.float32(1)
_SOURCES = (__file__, str(addresses.__file__), str(simd.__file__))
_compiled: Any = {"sources": _SOURCES, "nogil": True, "error_model": "numpy"}


@compiled(types.void(*[_address] * 3, types.float32, types.boolean, *[_address] * 2, _count, _count), **_compiled)
def rms_norm(at_x, at_residual, at_weight, epsilon, adds, at_summed, at_out, rows, size):
    """Write into `out` the norm of each of the `rows` of `x`; with `adds`, of `x + residual`, and that sum into `summed`.

    `size` of a row is a multiple of 16. Without `adds`, `residual` and `summed` may be anything.
    """
    x, weight, out = floats(at_x, rows * size), floats(at_weight, size), floats(at_out, rows * size)
    residual, summed = floats(at_residual, rows * size), floats(at_summed, rows * size)
    for row in range(0, rows * size, size):
        squares = simd.splat(_ZERO)
        for at in range(row, row + size, LANES):
            value = simd.load(x, at)
            if adds:
                value = simd.add(value, simd.load(residual, at))
                simd.store(summed, at, value)
            squares = simd.fma(value, value, squares)
        scale = simd.splat(_ONE / np.sqrt(simd.total(squares) / np.float32(size) + epsilon))
        for at in range(0, size, LANES):
            value = simd.load(summed, row + at) if adds else simd.load(x, row + at)
            simd.store(out, row + at, simd.multiply(simd.multiply(value, scale), simd.load(weight, at)))


@compiled(types.void(_address, _address, _count, _count), **_compiled)
def silu_and_mul(at_x, at_out, rows, size):
    """Write into `out` [rows, size] silu of the first half of each row of `x` times the second half."""
    x, out = floats(at_x, 2 * rows * size), floats(at_out, rows * size)
    one, minus = simd.splat(_ONE), simd.splat(-_ONE)
    for row in range(0, rows * size, size):
        for at in range(row, row + size, LANES):
            gate = simd.load(x, row + at)
            sigmoid = simd.divide(one, simd.add(one, simd.exp(simd.multiply(gate, minus))))
            simd.store(out, at, simd.multiply(simd.multiply(gate, sigmoid), simd.load(x, row + at + size)))


@compiled(types.void(*[_address] * 3, types.float32, *[_address] * 2, _count, _count), **_compiled)
def rms_norm_backward(at_x, at_weight, at_grad, epsilon, at_to_x, at_to_weight, rows, size):
    """Write the gradient of `rows` of `x` and add that of the weight [size], where `grad` is that of `rms_norm`'s answer.

    With r = 1 / rms(x) and h = grad * weight: r * h - x * r^3 * mean(h * x), and the sum over rows of grad * x * r.
    """
    x, weight, grad = floats(at_x, rows * size), floats(at_weight, size), floats(at_grad, rows * size)
    to_x, to_weight = floats(at_to_x, rows * size), floats(at_to_weight, size)
    for row in range(0, rows * size, size):
        squares, products = simd.splat(_ZERO), simd.splat(_ZERO)
        for at in range(0, size, LANES):
            value = simd.load(x, row + at)
            squares = simd.fma(value, value, squares)
            products = simd.fma(simd.multiply(simd.load(grad, row + at), simd.load(weight, at)), value, products)
        scale = _ONE / np.sqrt(simd.total(squares) / np.float32(size) + epsilon)
        r, back = simd.splat(scale), simd.splat(-scale * scale * scale * simd.total(products) / np.float32(size))
        for at in range(0, size, LANES):
            value, slope = simd.load(x, row + at), simd.multiply(simd.load(grad, row + at), r)
            simd.store(to_x, row + at, simd.fma(slope, simd.load(weight, at), simd.multiply(value, back)))
            simd.store(to_weight, at, simd.fma(slope, value, simd.load(to_weight, at)))


@compiled(types.void(_address, _address, _address, _count, _count), **_compiled)
def silu_and_mul_backward(at_x, at_grad, at_to_x, rows, size):
    """Write the gradient of `x` [rows, 2 * size], where `grad` [rows, size] is that of `silu_and_mul`'s answer."""
    x, grad, to_x = floats(at_x, 2 * rows * size), floats(at_grad, rows * size), floats(at_to_x, 2 * rows * size)
    one, minus = simd.splat(_ONE), simd.splat(-_ONE)
    for row in range(0, rows * size, size):
        for at in range(row, row + size, LANES):
            gate, slope = simd.load(x, row + at), simd.load(grad, at)
            sigmoid = simd.divide(one, simd.add(one, simd.exp(simd.multiply(gate, minus))))
            swish = simd.multiply(gate, sigmoid)
            bent = simd.fma(swish, simd.subtract(one, sigmoid), sigmoid)  # silu's derivative
            simd.store(to_x, row + at, simd.multiply(simd.multiply(slope, simd.load(x, row + at + size)), bent))
            simd.store(to_x, row + at + size, simd.multiply(slope, swish))
