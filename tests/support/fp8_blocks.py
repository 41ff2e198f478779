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


def blocks(matrix: np.ndarray, least: float = 1e-12) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and scales of a float32 matrix, block by block, in float32 as a device would compute them."""
    rows, columns = matrix.shape
    quantised = np.zeros(matrix.shape, np.uint8)
    scales = np.zeros((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            multiplier = np.float32(448) / max(np.abs(matrix[place]).max(), np.float32(least))
            scales[i, j] = np.float32(1) / multiplier
            quantised[place] = [[nearest(x) for x in row] for row in matrix[place] * multiplier]
    return quantised, scales


def stands_for(quantised: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 matrix that bytes and scales stand for."""
    return np.array(
        [
            [np.float32(number(byte)) * scales[i // BLOCK, j // BLOCK] for j, byte in enumerate(row)]
            for i, row in enumerate(quantised)
        ]
    )


def rounded_activations(x: np.ndarray) -> np.ndarray:
    """Activations [tokens, columns] once each 128 columns of a token have gone through fp8."""
    groups = x.reshape(-1, BLOCK)
    return np.concatenate([stands_for(*blocks(group[None], least=1e-10)) for group in groups]).reshape(x.shape)
