"""`cpu.rows` on torch tensors, with their gradients: RMSNorm and the gated activation of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctpo_megatron.kernels.cpu import rows as k
from ctpo_megatron.kernels.cpu.addresses import address, has_numbers
from ctpo_megatron.kernels.cpu.lanes import LANES
from ctpo_megatron.kernels.cpu.threads import equal_shares, in_threads

ALONE = 2**16  # numbers up to which one thread is faster: starting another takes as long
BLOCK = 64  # rows whose part of a weight's gradient is summed at a time: one long sum would round more, and differ with threads


def normalises(x: Tensor, weight: Tensor) -> bool:
    """Returns whether `rms_norm` takes them."""
    same = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and weight.is_contiguous()
    return same and x.shape[-1] == weight.numel() and weight.numel() % LANES == 0


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, whose size is the weight's."""
    return _RmsNorm.apply(x, weight, epsilon)


def gates(x: Tensor) -> bool:
    """Returns whether `silu_and_mul` takes it."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[-1] % (2 * LANES) == 0


def silu_and_mul(x: Tensor) -> Tensor:
    """Returns silu of the first half of the last dimension times the second half."""
    return _SiluAndMul.apply(x)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)  # not a copy: what it is a part of is kept anyway
        ctx.epsilon = epsilon
        out, size, step = x.new_empty(x.shape), weight.numel(), 4 * weight.numel()
        if not has_numbers(x):
            return out
        x, at = address(x)
        at_out, at_weight = out.data_ptr(), weight.data_ptr()

        def take(first: int, last: int) -> None:
            mine = at + first * step
            k.rms_norm(mine, mine, at_weight, epsilon, False, mine, at_out + first * step, last - first, size)

        _each_row(take, x.numel() // size, size)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        size, count = weight.numel(), x.numel() // weight.numel()
        blocks = -(-count // BLOCK)
        to_x, to_weight = x.new_empty(x.shape), x.new_zeros(blocks, size)
        if not has_numbers(x):
            return to_x, to_weight.sum(0).view(weight.shape), None
        (x, at_x), (grad, at_grad) = address(x), address(grad)
        at_weight, at_to_x, at_to_weight = (each.data_ptr() for each in (weight, to_x, to_weight))

        def take(first: int, last: int) -> None:
            for block in range(first, last):
                begin, step = block * BLOCK, 4 * size * BLOCK * block
                told = (at_x + step, at_weight, at_grad + step, ctx.epsilon, at_to_x + step, at_to_weight + 4 * size * block)
                k.rms_norm_backward(*told, min(BLOCK, count - begin), size)

        _each_row(take, blocks, size * BLOCK)
        return to_x, to_weight.sum(0).view(weight.shape), None


class _SiluAndMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        size = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], size)
        if not has_numbers(x):
            return out
        (x, at), at_out = address(x), out.data_ptr()

        def take(first: int, last: int) -> None:
            k.silu_and_mul(at + 8 * size * first, at_out + 4 * size * first, last - first, size)

        _each_row(take, out.numel() // size, size)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        size, to_x = x.shape[-1] // 2, x.new_empty(x.shape)
        if not has_numbers(x):
            return to_x
        (x, at_x), (grad, at_grad), at_to_x = address(x), address(grad), to_x.data_ptr()

        def take(first: int, last: int) -> None:
            wide = 8 * size * first
            k.silu_and_mul_backward(at_x + wide, at_grad + wide // 2, at_to_x + wide, last - first, size)

        _each_row(take, grad.numel() // size, size)
        return to_x


def _each_row(take: Any, count: int, size: int) -> None:
    """Call `take` for all of `count` things of `size` numbers, by torch's number of threads where that is worth it."""
    in_threads(take, equal_shares(count, torch.get_num_threads() if count * size > ALONE else 1))
