"""A 64-bit digest of a tensor's bytes that adds up over parts: the trainer and an engine can both find it, each from its own cut.

With the tensor seen as a matrix (its last dimension is a row), the bytes of a row as unsigned words x of 32 bits, filled up with
zeros, and fixed pseudo-random odd keys a and c:

    digest = sum over rows r of a[r] * (sum over words w of c[w] * x[r, w])   mod 2**64

These are sums of integers, so order, blocks, threads and devices do not matter. Parts that lie at their own places add up to the
whole, also where they share a word, and zeros add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MODULUS = 2**64
_WORD = 4  # bytes
_BLOCK = 2**22  # words that torch multiplies in one call, where numba does not: servers on GPUs have little memory to spare


@torch.no_grad()
def tensor_digest(tensor: Tensor, row: int = 0, column: int = 0) -> int:
    """Digest of `tensor`, in [0, 2**64).

    `row` and `column` say where its first element lies when it is a part of a larger one of the same number format; a vector is a
    matrix of one row. All bits count: NaN payloads and the sign of zero too. Any other content, as far as it does not depend on
    the keys, has another digest but for odds of less than 2**-28, and that only where nothing but signs of float32 differ: a key
    has 33 bits left to tell by what a word's last bit is multiplied. It protects against mistakes, not against a person who knows
    the keys.
    """
    return tensor_digests([Part(tensor, row, column)])[0]


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor, and where its first element lies in a larger one of the same number format."""

    tensor: Tensor
    row: int = 0
    column: int = 0


@torch.no_grad()
def tensor_digests(parts: Iterable[Part]) -> list[int]:
    """The digest of each part, see `tensor_digest`. All parts lie on one device.

    Whatever their number, a device is waited for once: a copy to the host for each of them would take longer than the sums.
    """
    sums = [_sum_up(part.tensor, part.row, part.column) for part in parts]
    on_device = [each for each in sums if isinstance(each, Tensor)]
    copied = iter(torch.stack(on_device).tolist() if on_device else [])
    return [(next(copied) if isinstance(each, Tensor) else each) % MODULUS for each in sums]


def _sum_up(tensor: Tensor, row: int, column: int) -> int | Tensor:
    """The digest: a number, or on other devices than CPUs a scalar int64 that has yet to be copied to the host."""
    if tensor.numel() == 0:
        return 0
    first = column * tensor.element_size()
    words = _words(tensor, first % _WORD)
    rows, width = words.shape
    begin = first // _WORD
    column_keys = _keys(_table_size(begin + width), 1, tensor.device)[begin : begin + width]
    row_keys = _keys(_table_size(row + rows), 2, tensor.device)[row : row + rows]
    compiled = _compiled() if tensor.device.type == "cpu" else None
    if compiled is None:
        return _by_torch(words, row_keys, column_keys)
    stride = words.stride(0)
    flat = words.as_strided(((rows - 1) * stride + width,), (1,))
    return int(compiled(*(_unsigned(each) for each in (flat, row_keys, column_keys)), stride))


def _words(tensor: Tensor, before: int) -> Tensor:
    """[rows, words of a row] int32, with `before` zero bytes in front; a view where the rows' own words lie side by side."""
    matrix = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(-1, tensor.shape[-1])
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    bytes_ = matrix.view(torch.int8)
    after = -(before + bytes_.shape[1]) % _WORD
    if before or after or bytes_.stride(0) % _WORD or bytes_.data_ptr() % _WORD:
        bytes_ = torch.nn.functional.pad(bytes_, (before, after)).contiguous()
    return bytes_.view(torch.int32)


def _by_torch(words: Tensor, row_keys: Tensor, column_keys: Tensor) -> Tensor:
    """The digest on any device, as a scalar int64, in several passes over memory."""
    blocks = words.split(max(1, _BLOCK // words.shape[1]))
    sums = [((block.to(torch.int64) & 0xFFFFFFFF) * column_keys).sum(1) for block in blocks]
    return (torch.cat(sums) * row_keys).sum()


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., int] | None:
    """`_by_torch` on CPUs in one pass, at the speed of memory, several times as fast as torch. None where numba is missing."""
    try:
        import numba

        from ctpo_megatron.kernels.compiled import compiled
    except ImportError:
        return None
    words, keys = numba.uint32[::1], numba.uint64[::1]

    @compiled(numba.uint64(words, keys, keys, numba.intp), (__file__,), nogil=True)
    def sum_up(words: np.ndarray, row_keys: np.ndarray, column_keys: np.ndarray, stride: int) -> np.uint64:
        total = np.uint64(0)
        for row in range(len(row_keys)):
            line = words[row * stride : row * stride + len(column_keys)]
            mixed = np.uint64(0)
            for column in range(len(column_keys)):
                mixed += np.uint64(line[column]) * column_keys[column]
            total += mixed * row_keys[row]
        return total

    return sum_up


def _unsigned(tensor: Tensor) -> np.ndarray:
    return tensor.numpy().view({torch.int32: np.uint32, torch.int64: np.uint64}[tensor.dtype])


def _table_size(count: int) -> int:
    """The length of the table that has `count` keys: a power of two, so that few tables are made."""
    return 2 ** math.ceil(math.log2(max(count, 2**10)))


@lru_cache(maxsize=64)
def _keys(count: int, stream: int, device: torch.device) -> Tensor:
    """[count] int64, odd: SplitMix64 (Steele, Lea and Flood, 2014), so that keys never depend on a version of torch."""
    state = (torch.arange(1, count + 1) + (stream << 40)) * _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
    return ((state ^ _shift(state, 31)) | 1).to(device)


def _shift(words: Tensor, bits: int) -> Tensor:
    """`words` shifted to the right by `bits`, filled with zeros."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    return number - MODULUS if number >= 2**63 else number
