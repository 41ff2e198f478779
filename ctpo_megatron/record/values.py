"""Numbers of a run that know how they combine: over parts of a batch, over ranks, over optimizer steps.

A value is a number or a vector of numbers, such as one per range of positions. Values are small, frozen and picklable, so they
travel between processes; none of them is a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Number: TypeAlias = float | NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sum:
    """A quantity that adds up."""

    total: Number

    def merge(self, other: Sum) -> Sum:
        """The sum of both parts."""
        return Sum(self.total + other.total)

    def result(self) -> Number:
        """The sum itself."""
        return self.total


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean, kept as its two sums; `weight` is how much stands behind `total`."""

    total: Number
    weight: Number = 1.0

    def merge(self, other: Mean) -> Mean:
        """The mean over both parts."""
        return Mean(self.total + other.total, self.weight + other.weight)

    def result(self) -> Number:
        """`total / weight`; 0 where nothing was weighed."""
        if isinstance(self.total, np.ndarray):
            return np.divide(self.total, self.weight, out=np.zeros_like(self.total), where=np.asarray(self.weight) != 0)
        return self.total / self.weight if self.weight else 0.0


@dataclass(frozen=True, slots=True)
class Max:
    """The largest of all."""

    value: Number

    def merge(self, other: Max) -> Max:
        """The larger of both; NaN where one of them is."""
        return Max(_plain(np.maximum(self.value, other.value)))

    def result(self) -> Number:
        """The largest."""
        return self.value


@dataclass(frozen=True, slots=True)
class Min:
    """The smallest of all."""

    value: Number

    def merge(self, other: Min) -> Min:
        """The smaller of both; NaN where one of them is."""
        return Min(_plain(np.minimum(self.value, other.value)))

    def result(self) -> Number:
        """The smallest."""
        return self.value


Value: TypeAlias = Sum | Mean | Max | Min
Values: TypeAlias = dict[str, Value]
DumpedValues: TypeAlias = dict[str, tuple[Literal["Sum", "Mean", "Max", "Min"], list[float | list[float]]]]
"""Values as plain data: under each name its reduction and the numbers that this is made of."""


def merge_values(parts: Iterable[Mapping[str, Value]]) -> Values:
    """All parts as one; a name that only some parts have counts where it is.

    Raises TypeError where one name has two reductions.
    """
    merged: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name in merged and type(merged[name]) is not type(value):
                raise TypeError(f"{name} is a {type(merged[name]).__name__} in one part and a {type(value).__name__} in another")
            merged[name] = merged[name].merge(value) if name in merged else value
    return merged


def without_vectors(values: Values) -> Values:
    """The values that are one number: of ranks that all found the same, one tells vectors, as a thousand would tell megabytes."""
    return {name: value for name, value in values.items() if not isinstance(value.result(), np.ndarray)}


def dump_values(values: Values) -> DumpedValues:
    """The values as plain data, for `parse_values`; no number is rounded."""
    return {
        name: (_NAMES[type(value)], [_dumped(getattr(value, each.name)) for each in fields(value)])
        for name, value in values.items()
    }


def parse_values(dumped: DumpedValues) -> Values:
    """What `dump_values` was given."""
    kinds = {name: kind for kind, name in _NAMES.items()}
    return {name: kinds[kind](*(_parsed(each) for each in numbers)) for name, (kind, numbers) in dumped.items()}


_NAMES: dict[type[Value], Literal["Sum", "Mean", "Max", "Min"]] = {Sum: "Sum", Mean: "Mean", Max: "Max", Min: "Min"}


def _dumped(number: Number) -> float | list[float]:
    return number.tolist() if isinstance(number, np.ndarray) else float(number)


def _parsed(number: float | list[float]) -> Number:
    return np.array(number, dtype=np.float64) if isinstance(number, list) else number


def scalar(value: Value) -> float:
    """The result of a value that is one number. Raises TypeError for a vector."""
    found = value.result()
    if isinstance(found, np.ndarray):
        raise TypeError(f"{type(value).__name__} of {found.size} numbers where one is needed")
    return found


def _plain(value: Any) -> Number:
    """A number as float, a vector as it is."""
    return value if np.ndim(value) else float(value)
