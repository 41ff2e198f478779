"""How fast something grows, against lines whose slope is known."""

from __future__ import annotations

import numpy as np
import pytest

from ctpo_megatron.record.slope import HOUR, LEAST_S, Slope, median_slope


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def slopes(values: list[tuple[float, float]]) -> list[float | None]:
    clock = Clock()
    slope, found = Slope(clock), []
    for clock.now, value in values:
        found.append(slope.read(value))
    return found


def test_a_line_has_its_slope_and_a_start_has_none() -> None:
    found = slopes([(t, 5.0 + 2.0 * t / HOUR) for t in range(0, 1200, 10)])
    assert found[int(LEAST_S / 10) - 1] is None
    assert found[-1] == pytest.approx(2.0)


def test_what_was_more_than_an_hour_ago_counts_no_more() -> None:
    grown = [(t, t / HOUR) for t in range(0, int(HOUR), 60)]
    assert slopes([*grown, *((HOUR + t, 1.0) for t in range(0, int(HOUR) + 61, 60))])[-1] == pytest.approx(0.0, abs=1e-9)


def test_steps_of_hours_have_a_slope_too() -> None:
    assert slopes([(3 * HOUR * n, 1.5 * n) for n in range(20)])[-1] == pytest.approx(0.5)


def test_single_wild_readings_do_not_move_it() -> None:
    line = [(t, 5.0 + 2.0 * t / HOUR + (50.0 if t == 1140 else 0.0)) for t in range(0, 1200, 60)]
    assert slopes(line)[-1] == pytest.approx(2.0)


def test_readings_at_one_place_say_nothing() -> None:
    assert median_slope(np.array([1.0, 1.0, 2.0]), np.array([0.0, 9.0, 9.0])) == pytest.approx(4.5)
    assert median_slope(np.ones(3), np.arange(3.0)) == 0.0
