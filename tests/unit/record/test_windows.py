"""Extremes over windows of steps, and that a run which goes back shows the same windows as one that did not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ctpo_megatron.record.catalogue import CATALOGUE
from ctpo_megatron.record.windows import WINDOW, Windows, window_begin, window_charts

VALUES = {step: float(value) for step, value in enumerate(np.random.default_rng(1).normal(size=3 * WINDOW + 9))}


def shown(windows: Windows, steps: range) -> dict[int, dict[str, float]]:
    """What comes of `steps`, by the step at which it is shown."""
    found = {step: windows.add(step, {"reward/mean": VALUES[step], "reward/mixed_groups": 1.0}) for step in steps}
    return {step: window for step, window in found.items() if window}


def test_a_spike_of_one_step_is_not_lost() -> None:
    windows = Windows()
    for step in range(1, WINDOW + 1):
        assert windows.add(step, {"train/loss": 1e6 if step == 37 else 1.0}) == {}
    found = windows.add(WINDOW + 1, {"train/loss": 7.0})
    mean = (1e6 + WINDOW - 1) / WINDOW
    expected = {"windows/train/loss": mean, "windows/train/loss/min": 1.0, "windows/train/loss/max": 1e6}
    assert found == pytest.approx(expected)


def test_only_what_is_watched_has_windows_and_each_step_is_in_one() -> None:
    found = shown(Windows(), range(len(VALUES)))
    assert list(found) == [WINDOW + 1, 2 * WINDOW + 1, 3 * WINDOW + 1]
    for number, window in enumerate(found.values()):
        first = number * WINDOW + 1 if number else 0  # the policy before training belongs to the first
        values = [VALUES[step] for step in range(first, (number + 1) * WINDOW + 1)]
        assert window["windows/reward/mean/min"] == min(values)
        assert window["windows/reward/mean/max"] == max(values)
        assert window["windows/reward/mean"] == pytest.approx(sum(values) / len(values))
        assert len(window) == 3


@pytest.mark.parametrize("stale", [2, 50, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 2 * WINDOW + 1, 2 * WINDOW + 50])
def test_a_run_that_goes_on_shows_the_windows_of_one_that_never_ended(stale: int) -> None:
    """Points of `stale` and later are cut; what is needed to make them anew lies in the steps from `window_begin` on."""
    whole = shown(Windows(), range(1, len(VALUES)))
    before = [(step, {"reward/mean": VALUES[step]}) for step in range(max(1, window_begin(stale)), stale)]
    assert len(before) <= WINDOW
    again = shown(Windows(before), range(stale, len(VALUES)))
    assert again == {step: window for step, window in whole.items() if step >= stale}


def test_what_is_not_a_number_shows() -> None:
    windows = Windows()
    for step, value in ((1, 1.0), (2, math.nan), (3, 2.0)):
        windows.add(step, {"train/loss": value})
    found = windows.add(WINDOW + 1, {})
    assert all(math.isnan(value) for value in found.values())


def test_charts_stand_as_tensorboard_turns_them_round() -> None:
    """Its page shows charts with bands from the last to the first."""
    (charts,) = window_charts().values()
    watched = [metric.name for metric in CATALOGUE if metric.watched and not metric.is_family]
    assert [tags[1][0] for tags in reversed(charts.values())] == [f"windows/{name}" for name in watched]
