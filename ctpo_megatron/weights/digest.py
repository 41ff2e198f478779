"""A 64-bit digest of a tensor's bytes that adds up over parts: the trainer and an engine can both find it, each from its own cut.

With the tensor seen as a matrix of bytes x (its last dimension is a row), and fixed pseudo-random keys a, b, c:

    digest = sum over rows r of a[r] * sum over j < 8 of b[j] * (sum over byte columns k of x[r, k] * c[k, j])   mod 2**64

The innermost sums are exact integers, so order, blocks, threads and devices do not matter. Parts that lie at their own places add
up to the whole, and zeros add nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

MODULUS = 2**64
_KEYS = 8
_CPU_BLOCK = 2**21  # bytes that are multiplied in one call: a call costs as much as 0.1 MB
_DEVICE_BLOCK = 2**26


@torch.no_grad()
def tensor_digest(tensor: Tensor, row: int = 0, column: int = 0) -> int:
    """Digest of `tensor`, in [0, 2**64).

    `row` and `column` say where its first element lies when it is a part of a larger one of the same number format; a vector is a
    matrix of one row. All bits count: NaN payloads and the sign of zero too. Any other content, as far as it does not depend on
    the keys, has another digest but for odds of about 2**-48: of the 2**6 values a key c may have, at most one for each j
    makes two rows that differ look alike. It protects against mistakes, not against somebody who knows the keys.
    """
    if tensor.numel() == 0:
        return 0
    bytes_ = _byte_matrix(tensor)
    rows, width = bytes_.shape
    first = column * tensor.element_size()
    byte_keys = _byte_keys(_table_size(first + width), tensor.device)[:, first : first + width]
    row_keys = _row_keys(_table_size(row + rows), tensor.device)[row : row + rows]
    block = max(1, (_CPU_BLOCK if tensor.device.type == "cpu" else _DEVICE_BLOCK) // width)
    sums = [_products(part, byte_keys) for part in bytes_.split(block)]
    mixed = (torch.cat(sums) * _column_keys(tensor.device)).sum(1)
    return int((mixed * row_keys).sum()) % MODULUS


def _byte_matrix(tensor: Tensor) -> Tensor:
    """[rows, bytes of a row] int8; a view where the rows' own elements lie side by side."""
    matrix = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(-1, tensor.shape[-1])
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    return matrix.view(torch.int8)


def _products(block: Tensor, byte_keys: Tensor) -> Tensor:
    """block [R, K] int8 and keys [8, K] int8 to their exact products [R, 8] int64."""
    if block.device.type == "cpu" and torch.backends.mkldnn.is_available():
        limit, multiply = 2**17, _int8_product  # 2**17 products of 7 + 6 bits fit into an int32
    else:
        limit, multiply = 2**10, _float_product  # and 2**10 into the 24 exact bits of a float32, whatever the order
    parts = zip(block.split(limit, 1), byte_keys.split(limit, 1), strict=True)
    return sum(multiply(part, keys).to(torch.int64) for part, keys in parts)


def _int8_product(block: Tensor, byte_keys: Tensor) -> Tensor:
    return torch._int_mm(block, byte_keys.t())


def _float_product(block: Tensor, byte_keys: Tensor) -> Tensor:
    """Where integer matrices are not multiplied by the device's library. TensorFloat-32 holds these integers exactly too."""
    return block.float() @ byte_keys.t().float()


def _table_size(count: int) -> int:
    """Tables of keys come in powers of two, so that few are made."""
    return 2 ** math.ceil(math.log2(max(count, 2**10)))


@lru_cache(maxsize=64)
def _byte_keys(count: int, device: torch.device) -> Tensor:
    """[8, count] int8, odd, within +-63: old processors add two products of int8 in 16 bits, which larger ones would overflow."""
    numbers = _pseudo_random(count * _KEYS, stream=1).view(count, _KEYS).t()
    return ((numbers & 63) * 2 - 63).to(torch.int8).contiguous().to(device)


@lru_cache(maxsize=64)
def _row_keys(count: int, device: torch.device) -> Tensor:
    """[count] int64, odd."""
    return (_pseudo_random(count, stream=2) | 1).to(device)


@lru_cache(maxsize=8)
def _column_keys(device: torch.device) -> Tensor:
    """[8] int64, odd."""
    return (_pseudo_random(_KEYS, stream=3) | 1).to(device)


def _pseudo_random(count: int, stream: int) -> Tensor:
    """[count] int64: SplitMix64 (Steele, Lea and Flood, 2014), so that keys never depend on a version of torch."""
    state = (torch.arange(1, count + 1) + (stream << 40)) * _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift(state, 31)


def _shift(words: Tensor, bits: int) -> Tensor:
    """To the right, filling with zeros."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    return number - MODULUS if number >= 2**63 else number
