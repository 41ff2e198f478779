"""A slow second reading of fp8 blocks, which shares no code with the package: a table of all numbers of the format, and loops."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

BLOCK = 128
# every number of e4m3fn that is not negative, by its byte: 4 bits of exponent with bias 7, 3 of mantissa, 0x7f is NaN
TABLE = [
    (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    for exponent in range(16)
    for mantissa in range(8)
][:127]


def nearest(x: float) -> int:
    """The byte of the number of the format that is nearest to `x`, of two that are equally near the one that ends in a zero."""
    size = abs(float(x))
    above = min(bisect_left(TABLE, size), 126)
    byte = min((max(above - 1, 0), above), key=lambda at: (abs(TABLE[at] - size), at % 2))
    return byte | (0x80 if np.signbit(x) else 0)


def number(byte: int) -> float:
    return -TABLE[byte - 0x80] if byte & 0x80 else TABLE[byte]


def all_nearest(numbers: np.ndarray) -> np.ndarray:
    """`nearest` of every number."""
    table, size = np.array(TABLE), np.abs(numbers.astype(np.float64))
    above = np.searchsorted(table, size).clip(max=126)
    below = (above - 1).clip(min=0)
    low, high = size - table[below], np.abs(table[above] - size)
    chosen = np.where((low < high) | ((low == high) & (below % 2 == 0)), below, above)
    return (chosen + np.where(np.signbit(numbers), 0x80, 0)).astype(np.uint8)


def blocks(matrix: np.ndarray, least: float = 1e-12) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and scales of a float32 matrix, block by block, in float32 as a device would compute them."""
    rows, columns = matrix.shape
    quantised = np.zeros(matrix.shape, np.uint8)
    scales = np.zeros((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            multiplier = np.float32(1) / max(np.abs(matrix[place]).max(), np.float32(least)) * np.float32(448)
            scales[i, j] = np.float32(1) / multiplier
            quantised[place] = all_nearest(matrix[place] * multiplier)
    return quantised, scales


def stands_for(quantised: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 matrix that bytes and scales stand for."""
    numbers = np.array([number(byte) if byte & 0x7F != 0x7F else np.nan for byte in range(256)], np.float32)
    found = numbers[quantised]
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            found[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= scales[i, j]
    return found


def rounded_activations(x: np.ndarray) -> np.ndarray:
    """Activations [tokens, columns] once each 128 columns of a token have gone through fp8."""
    groups = x.reshape(-1, BLOCK)
    return np.concatenate([stands_for(*blocks(group[None], least=1e-10)) for group in groups]).reshape(x.shape)
