"""Values that know how they combine: merged parts are the whole, in any order, for numbers and for vectors."""

from __future__ import annotations

import math
import pickle
from functools import reduce

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.record.values import DumpedValues, Max, Mean, Min, Sum, dump_values, merge_values, parse_values, scalar

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9)


@given(NUMBERS, st.randoms())
def test_parts_in_any_order_are_the_whole(numbers: list[float], random: object) -> None:
    shuffled = list(numbers)
    random.shuffle(shuffled)
    found = merge_values({"sum": Sum(x), "mean": Mean(2 * x, 2.0), "max": Max(x), "min": Min(x)} for x in shuffled)
    assert scalar(found["sum"]) == pytest.approx(math.fsum(numbers), abs=1e-6)
    assert scalar(found["mean"]) == pytest.approx(math.fsum(numbers) / len(numbers), abs=1e-6)
    assert (scalar(found["max"]), scalar(found["min"])) == (max(numbers), min(numbers))


@given(st.lists(st.floats(), max_size=4), st.floats())
def test_values_survive_being_plain_data(vector: list[float], number: float) -> None:
    """To the bit, through MessagePack, as they travel between pipeline stages."""
    numbers = np.array(vector, dtype=np.float64)
    values = {"sum": Sum(numbers), "mean": Mean(number, numbers), "max": Max(number), "min": Min(np.float64(number))}
    sent = msgspec.msgpack.encode(dump_values(values))
    found = parse_values(msgspec.msgpack.decode(sent, type=DumpedValues))
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in values.items()}
    for one, other in [(found["sum"].total, numbers), (found["mean"].weight, numbers)]:
        assert isinstance(one, np.ndarray)
        assert one.dtype == np.float64
        np.testing.assert_array_equal(one, other)
    assert {repr(each) for each in (found["mean"].total, found["max"].value, found["min"].value)} == {repr(number)}


def test_vectors_are_merged_entry_by_entry() -> None:
    rows = [np.array([1.0, 5.0, 0.0]), np.array([3.0, -2.0, 0.0])]
    weights = [np.array([1.0, 2.0, 0.0]), np.array([3.0, 2.0, 0.0])]
    assert reduce(Sum.merge, map(Sum, rows)).result().tolist() == [4.0, 3.0, 0.0]
    assert reduce(Max.merge, map(Max, rows)).result().tolist() == [3.0, 5.0, 0.0]
    assert reduce(Min.merge, map(Min, rows)).result().tolist() == [1.0, -2.0, 0.0]
    mean = reduce(Mean.merge, map(Mean, rows, weights))
    assert mean.weight.tolist() == [4.0, 4.0, 0.0]
    assert mean.result().tolist() == [1.0, 0.75, 0.0]  # a mean of nothing is 0


def test_a_mean_is_of_all_that_was_weighed_not_of_the_parts_means() -> None:
    assert Mean(1.0, 1.0).merge(Mean(9.0, 3.0)).result() == 2.5
    assert Mean(0.0, 0.0).result() == 0.0
    assert Mean(4.0).merge(Mean(2.0)).result() == 3.0


@pytest.mark.parametrize("kind", [Max, Min])
@pytest.mark.parametrize("order", [(math.nan, 1.0), (1.0, math.nan)])
def test_no_order_hides_nan_in_an_extreme(kind: type[Max] | type[Min], order: tuple[float, float]) -> None:
    first, second = map(kind, order)
    assert math.isnan(first.merge(second).result())


def test_a_name_that_only_some_parts_have_counts_where_it_is() -> None:
    assert merge_values([{"a": Sum(1.0)}, {"a": Sum(2.0), "b": Max(3.0)}]) == {"a": Sum(3.0), "b": Max(3.0)}
    assert merge_values([]) == {}


def test_one_name_has_one_reduction() -> None:
    with pytest.raises(TypeError, match="x is a Sum in one part and a Max in another"):
        merge_values([{"x": Sum(1.0)}, {"x": Max(1.0)}])


def test_a_vector_is_no_scalar() -> None:
    with pytest.raises(TypeError, match="Sum of 2 numbers where one is needed"):
        scalar(Sum(np.ones(2)))


def test_they_travel_between_processes() -> None:
    values = {"a": Mean(1.0, 2.0), "b": Min(3.0)}
    assert pickle.loads(pickle.dumps(values)) == values
