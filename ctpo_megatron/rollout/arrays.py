"""Arrays in msgspec: what a record of sampled tokens holds besides numbers."""

from __future__ import annotations

from typing import Any

import numpy as np


def from_array(value: Any) -> Any:
    """Returns an array as type, shape and bytes; `enc_hook` of an encoder."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
    raise NotImplementedError(f"{type(value).__name__} cannot be kept in a record")


def to_array(_type: Any, value: Any) -> Any:
    """Returns the array that `from_array` was given; `dec_hook` of a decoder."""
    dtype, shape, data = value
    return np.frombuffer(data, dtype).reshape(shape).copy()
