"""Products with weights in float32 by oneDNN, on processors where torch's own library leaves half of the speed.

torch computes them by MKL, which takes no AVX-512 on processors of other makers than Intel. oneDNN does: on an AMD EPYC (Zen 5)
it has 240 GFLOP/s a core where MKL has 107. docs/bench_train.md has more of it.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FEWEST = 2**20  # multiplications; of fewer MKL makes more a second, since a call of oneDNN takes ten microseconds longer


def mkl_spares_instructions(cpuinfo: Path) -> bool:
    """Returns whether a processor, as the system tells of it, has AVX-512, and is none for which MKL uses that."""
    told = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "GenuineIntel" not in told and "avx512f" in told


@lru_cache
def pays() -> bool:
    """Returns whether products are computed by oneDNN here: torch has it, and would take MKL."""
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return there and mkl_spares_instructions(Path("/proc/cpuinfo"))


def takes(x: Tensor, weight: Tensor) -> bool:
    """Returns whether `linear` computes them by oneDNN, and is worth its call."""
    return pays() and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() * len(weight) >= FEWEST


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x [..., inputs] times the transpose of weight [outputs, inputs], plus bias; without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "") if takes(x, weight) else F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x [..., inputs] times the transpose of weight [outputs, inputs]: [..., outputs]."""
    return _Linear.apply(x, weight)


def sum_of_products(first: Tensor, second: Tensor) -> Tensor:
    """Returns the transpose of first [rows, m] times second [rows, n]: [m, n].

    The narrower one is laid out anew: oneDNN would do so by one thread, and in a way that costs up to half of the product.
    """
    if first.shape[1] > second.shape[1]:
        return sum_of_products(second, first).t()
    return product(first.t().contiguous(), second.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad  # a frozen weight's input need not be kept
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x = None if weight is None else product(grad, weight.t())
        to_weight = None if x is None else sum_of_products(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))
        return to_x, to_weight
