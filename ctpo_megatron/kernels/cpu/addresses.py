"""Arrays at addresses, for functions that numba compiles: what a tensor holds reaches them as an integer.

A tensor of 27 by 256 as a numpy array costs a call 2.2 us, the making of the view and numba's reading of it; as an address it
costs 0.3 us (one core of an Intel Xeon).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@intrinsic
def _pointer(_typing: Any, address: Any) -> Any:
    """Returns the pointer of an address."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), generate


@numba.njit(inline="always")
def floats(address, count):
    """Returns the `count` float32 at an address."""
    return numba.carray(_pointer(address), (count,), np.float32)


@numba.njit(inline="always")
def integers(address, count):
    """Returns the `count` int64 at an address."""
    return numba.carray(_pointer(address), (count,), np.int64)


@numba.njit(inline="always")
def table(address, rows, columns):
    """Returns the int32 [rows, columns] at an address."""
    return numba.carray(_pointer(address), (rows, columns), np.int32)


def has_numbers(x: Tensor) -> bool:
    """Returns whether a tensor has numbers at an address. torch's fake ones, which stand for others in a rehearsal, have none."""
    return not isinstance(x, FakeTensor)


def address(x: Tensor) -> tuple[Tensor, int]:
    """Returns `x`, or a copy in one row where it is not, and where its numbers lie. Keep the tensor as long as the address."""
    x = x if x.is_contiguous() else x.contiguous()
    return x, x.data_ptr()
