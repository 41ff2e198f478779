"""Rows of an Arrow table that hold the same, found without making Python objects of them.

Published files repeat themselves: DAPO's holds each of its prompts about a hundred times. What costs time and memory per row is
done once for rows that are the same. Each leaf of the nested columns is encoded by a dictionary, and a row's number is found from
the numbers of its leaves, all of it in Arrow's and numpy's own loops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LONGEST = 64  # entries of a list; rows with longer ones count as different from all others

Numbers = NDArray[np.int64]


def row_numbers(columns: list[Any]) -> Numbers:
    """Returns a number for each row of Arrow arrays of equal length, [rows]: the same number only where all columns are the same.

    Numbers count from 0 by first appearance. Columns of types that Arrow cannot encode make every row a number of its own.
    """
    import pyarrow as pa

    rows = len(columns[0])
    numbers = np.zeros(rows, np.int64)
    for column in columns:
        try:
            numbers = _joined(numbers, _encoded(column))
        except (pa.ArrowException, _TooLong):
            return np.arange(rows)
    return numbers


def first_places(numbers: Numbers) -> Numbers:
    """Returns where each of the numbers 0, 1, ... of `row_numbers` stands first."""
    places = np.empty(int(numbers.max(initial=-1)) + 1, np.int64)
    places[numbers[::-1]] = np.arange(len(numbers))[::-1]
    return places


class _TooLong(Exception):
    """A list has more entries than are compared."""


def _encoded(array: Any) -> Numbers:
    """A number for each entry of an array of any type."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(array.type):
        numbers = _as_numpy(array.is_valid())
        for child in array.flatten():
            numbers = _joined(numbers, _encoded(child))
        return numbers
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lengths = _as_numpy(pc.fill_null(pc.list_value_length(array), -1))
        entries = _encoded(array.flatten())
        numbers, starts = lengths + 1, np.cumsum(np.maximum(lengths, 0)) - np.maximum(lengths, 0)
        longest = int(lengths.max(initial=0))
        if longest > LONGEST:
            raise _TooLong
        for place in range(longest):
            there = lengths > place
            own = np.zeros(len(array), np.int64)
            own[there] = entries[starts[there] + place] + 1
            numbers = _joined(numbers, own)
        return numbers
    if pa.types.is_dictionary(array.type):
        return _as_numpy(pc.fill_null(array.indices, -1)) + 1
    return _as_numpy(pc.dictionary_encode(array, null_encoding="encode").indices)


def _joined(one: Numbers, other: Numbers) -> Numbers:
    """A number for each pair, by first appearance. Both are numbers of rows, so their product stays within 64 bits."""
    import pyarrow as pa

    pairs = one * (int(other.max(initial=0)) + 1) + other
    return _as_numpy(pa.array(pairs).dictionary_encode().indices)


def _as_numpy(array: Any) -> Numbers:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=np.int64)
