"""Loss spikes and reward collapses are told from the steps before, and from nothing else."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ctpo_megatron.config.spikes import SpikeConfig
from ctpo_megatron.loop.spikes import SpikeDetector, judge
from ctpo_megatron.record.nonfinite_events import OffCourse

CONFIG = SpikeConfig(loss=10.0, reward=8.0, window=20, least=10, patience=2)


def run(config: SpikeConfig, losses: list[float], rewards: list[float]) -> list[OffCourse]:
    detector = SpikeDetector(config)
    steps = enumerate(zip(losses, rewards, strict=True), start=1)
    return [event for n, (loss, reward) in steps for event in detector.step(n, {"train/loss": loss, "reward/mean": reward})]


def noisy(level: float, noise: float, steps: int, seed: int = 1) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(level, noise) for _ in range(steps)]


def test_a_run_that_learns_gives_no_alarm() -> None:
    losses = [each - 0.001 * n for n, each in enumerate(noisy(0.0, 0.05, 400))]
    rewards = [min(each + 0.002 * n, 1.0) for n, each in enumerate(noisy(0.1, 0.03, 400, seed=2))]
    assert run(CONFIG, losses, rewards) == []


def test_a_spike_counts_when_it_lasts_for_the_patience() -> None:
    losses, rewards = noisy(0.1, 0.01, 40), [0.5] * 40
    losses[30] = 5.0
    assert run(CONFIG, losses, rewards) == [], "a single step"
    losses[31] = 4.0
    (event,) = run(CONFIG, losses, rewards)
    assert (event.kind, event.step, event.metric, event.value) == ("loss spike", 32, "train/loss", 4.0)
    assert event.deviations > 10
    assert "loss spike at step 32: train/loss is 4, " in event.sentence


def test_a_reward_that_collapses_is_told_and_a_rise_is_not() -> None:
    rewards = noisy(0.6, 0.02, 30) + [0.02] * 2
    (event,) = run(CONFIG, [0.0] * 32, rewards)
    assert (event.kind, event.step) == ("reward collapse", 32)
    assert run(CONFIG, [0.0] * 32, noisy(0.1, 0.01, 30) + [1.0] * 2) == []


def test_a_window_in_which_nothing_moves_forgives_small_steps() -> None:
    """2 % of the median is the least deviation: 8 of them are 0.16 of a reward of 1."""
    assert run(CONFIG, [0.0] * 32, [1.0] * 30 + [0.85] * 2) == []
    assert run(CONFIG, [0.0] * 32, [1.0] * 30 + [0.80] * 2) != []


def test_steps_without_a_value_and_values_that_are_not_finite_are_passed_over() -> None:
    detector = SpikeDetector(CONFIG)
    for n, loss in enumerate(noisy(0.1, 0.01, 30)):
        assert detector.step(n, {"train/loss": loss}) == []
    assert detector.step(30, {"train/loss": math.nan}) == []
    assert detector.step(31, {}) == []
    assert detector.step(32, {"train/loss": 9.0}) == []
    assert [event.step for event in detector.step(33, {"train/loss": 9.0})] == [33]


def test_a_run_that_goes_on_is_compared_with_the_steps_before() -> None:
    history = [{"train/loss": loss, "time/step": 1.0} for loss in noisy(0.1, 0.01, 30)]
    detector = SpikeDetector(CONFIG, [*history, {"train/loss": math.nan}, {"time/step": 1.0}])
    assert detector.step(30, {"train/loss": 9.0}) == [], "one of two steps"
    assert detector.step(31, {"train/loss": 9.0}) != []
    alone = SpikeDetector(CONFIG)
    assert [alone.step(n, {"train/loss": 9.0}) for n in range(11)] == [[]] * 11, "nothing to compare with"


def test_nothing_is_looked_for_by_default() -> None:
    assert run(SpikeConfig(), [0.1] * 30 + [1e9] * 5, [0.9] * 30 + [-1e9] * 5) == []
    with pytest.raises(ValidationError, match="least=10 is above window=5"):
        SpikeConfig(window=5)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=12, max_size=40),
    st.floats(0.1, 1e3),
    st.floats(-1e3, 1e3),
    st.floats(1.0, 50.0),
)
def test_the_verdict_follows_the_unit_and_the_sign_of_the_metric(
    values: list[float], scale: float, last: float, limit: float
) -> None:
    found = judge([*values, last], limit, above=True, least=10, patience=1)
    scaled = judge([scale * value for value in [*values, last]], limit, above=True, least=10, patience=1)
    mirrored = judge([-value for value in [*values, last]], limit, above=False, least=10, patience=1)
    assert (found is None) == (mirrored is None)
    near = found is not None and abs(found.deviations - limit) < 1e-6 * limit
    tiny = max(map(abs, [*values, last])) * min(scale, 1.0) < 1e-6
    assert near or tiny or (found is None) == (scaled is None) or _close(values, last, limit)


def _close(values: list[float], last: float, limit: float) -> bool:
    """Whether rounding decides."""
    lower = judge([*values, last], limit * (1 - 1e-9), above=True, least=10, patience=1)
    upper = judge([*values, last], limit * (1 + 1e-9), above=True, least=10, patience=1)
    return (lower is None) != (upper is None)
