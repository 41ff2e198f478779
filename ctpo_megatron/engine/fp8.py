"""Numbers in fp8 as SGLang keeps them: a block of numbers as float8_e4m3fn, and the float32 that each is to be multiplied by.

    multiplier = (1 / largest |x| of the block) * 448       (448 is the largest number of the format)
    q = x * multiplier, rounded to the nearest number of the format, ties to even
    scale = 1 / multiplier

so that x is about q * scale: to 1/16 of itself, where it is at least 2**-6 / 448 of the block's largest number, and to
2**-10 / 448 of that below. Weights have blocks of 128 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3), activations of 1 x 128.
A block of zeros has a scale too, as any other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ctpo_megatron.models.quantised import BLOCK, scale_shape

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
LEAST = 1e-12  # of a block's largest number, so that nothing is divided by zero; as SGLang's `input_to_float8` has it
LEAST_ACTIVATION = 1e-10  # as its `per_token_group_quant_fp8` has it
STRIP = 2**24  # numbers of a matrix that are looked at in float32 at a time


@torch.no_grad()
def quantise_matrix(matrix: Tensor, quantised: Tensor, scales: Tensor) -> None:
    """Write `matrix` [rows, columns] in blocks: into `quantised` of the same shape, in `DTYPE`, and `scales` [blocks of rows,
    blocks of columns] float32."""
    rows = max(1, STRIP // (matrix.shape[1] * BLOCK)) * BLOCK
    for first in range(0, matrix.shape[0], rows):
        part = matrix[first : first + rows]
        high, wide = part.shape
        filled = pad(part.float(), (0, -wide % BLOCK, 0, -high % BLOCK))
        blocks = filled.view(-1, BLOCK, filled.shape[1] // BLOCK, BLOCK)
        multiplier = blocks.abs().amax((1, 3), keepdim=True).clamp_(min=LEAST).reciprocal_().mul_(LARGEST)
        whole = blocks.mul_(multiplier).clamp_(-LARGEST, LARGEST).view(filled.shape)
        quantised[first : first + rows].copy_(whole[:high, :wide])
        at = first // BLOCK
        scales[at : at + len(blocks)].copy_(multiplier.reciprocal_().view(len(blocks), -1))


@torch.no_grad()
def quantised_matrix(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `matrix` in `DTYPE`, and its scales: `quantise_matrix`."""
    quantised = torch.empty(matrix.shape, dtype=DTYPE, device=matrix.device)
    scales = torch.empty(scale_shape(tuple(matrix.shape)), dtype=torch.float32, device=matrix.device)
    quantise_matrix(matrix, quantised, scales)
    return quantised, scales


@torch.no_grad()
def matrix_of(quantised: Tensor, scales: Tensor) -> Tensor:
    """Returns the matrix, or matrices [..., rows, columns], that blocks stand for, in float32."""
    rows, columns = quantised.shape[-2:]
    spread = scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return quantised.float() * spread[..., :rows, :columns]


@torch.no_grad()
def rounded_activations(x: Tensor) -> Tensor:
    """Returns `x` [tokens, columns] in float32, as it is once each 128 columns of a token have gone through fp8.

    SGLang's kernel finds the scale first and multiplies by its reciprocal. Raises ValueError for parts of a block.
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"activations of {x.shape[-1]} columns; SGLang quantises multiples of {BLOCK}")
    groups = x.float().view(len(x), -1, BLOCK)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=LEAST_ACTIVATION) / LARGEST
    rounded = (groups * (1.0 / scale)).clamp_(-LARGEST, LARGEST).to(DTYPE)
    return (rounded.float() * scale).view(x.shape)


def product(x: Tensor, quantised: Tensor, scales: Tensor) -> Tensor:
    """Returns `x` [tokens, inputs] times a weight [outputs, inputs] in blocks: both in fp8, sums in float32, in x's format."""
    return torch.nn.functional.linear(rounded_activations(x), matrix_of(quantised, scales)).to(x.dtype)
