"""Rewards shaped by length before they become advantages: examples by hand, and what must hold for any rewards."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.algorithms.advantages.shaping import length_rewards, overlong_penalty, shaped_rewards
from ctpo_megatron.config.advantages import LengthShaping, OverlongShaping, ShapingConfig
from tests.support.trajectories import group_of, trajectory


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0.0), (80, 0.0), (81, 0.05), (90, 0.5), (99, 0.95), (100, 1.0), (101, 1.0), (10**6, 1.0)],
)
def test_overlong_penalty(length, expected):
    assert overlong_penalty(length, max_tokens=100, buffer=20) == pytest.approx(expected, abs=1e-15)
    assert overlong_penalty(length, max_tokens=100, buffer=20, penalty=0.3) == pytest.approx(0.3 * expected, abs=1e-15)


def test_overlong_counts_tool_output_and_length_does_not():
    # 6 tokens, 3 of the policy; of the other, 4 and 4
    groups = [group_of(trajectory(1.0, [1, 2], [7, 7, 7], [3]), trajectory(1.0, [1, 2, 3, 4]))]
    assert shaped_rewards(groups, ShapingConfig(overlong=OverlongShaping(max_tokens=8, buffer=4))) == [[0.5, 1.0]]
    # standard scores of 3 and 4 are -1 and 1
    low, high = 1 - 0.6 / (1 + math.e), 1 - 0.6 / (1 + 1 / math.e)
    assert shaped_rewards(groups, ShapingConfig(length=LengthShaping())) == [pytest.approx([low, high], rel=1e-14)]
    both = ShapingConfig(length=LengthShaping(), overlong=OverlongShaping(max_tokens=8, buffer=4))
    assert shaped_rewards(groups, both) == [pytest.approx([low - 0.5, high], rel=1e-14)]


def test_length_rewards_by_hand():
    # of five groups the best one counts length: correct answers of 100, 200, 300 tokens, mean 200, variance 20000 / 3;
    # the long wrong answer takes no part in either and gets nothing
    rewards = [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    lengths = [[10, 20, 30, 40], [100, 200, 300, 9000], [10, 20, 30, 40], [10, 20, 30, 40], [10, 20, 30, 40]]
    score = 100 / math.sqrt(20000 / 3)
    short, long = 1 - 0.6 / (1 + math.exp(score)), 1 - 0.6 / (1 + math.exp(-score))
    assert length_rewards(rewards, lengths) == [
        [1, 0, 0, 0],
        pytest.approx([short, 0.7, long, 0], rel=1e-14),
        [1, 1, 0, 0],
        [0, 0, 0, 0],
        [1, 0, 0, 0],
    ]


def test_where_lengths_do_not_differ_a_correct_answer_is_of_average_length():
    assert length_rewards([[1, 0]], [[50, 3]]) == [[0.7, 0.0]]
    assert length_rewards([[1, 1, 1]], [[50, 50, 50]]) == [[0.7, 0.7, 0.7]]
    assert length_rewards([[0, 0]], [[50, 3]]) == [[0.0, 0.0]]


def test_equally_good_groups_are_ranked_by_length_and_stay_within_the_fraction():
    shaped = length_rewards([[1.0]] * 4, [[10], [40], [20], [30]], fraction=0.5)
    assert shaped == [[1.0], [0.7], [1.0], [0.7]]
    assert length_rewards([[1.0]] * 4, [[10], [40], [20], [30]], fraction=0.01) == [[1.0], [0.7], [1.0], [1.0]]
    assert length_rewards([[1.0]] * 4, [[10], [40], [20], [30]], fraction=1.0) == [[0.7]] * 4


def test_what_counts_as_correct():
    rewards, lengths = [[1.0, 0.5, -1.0, 1.1]], [[5, 5, 5, 5]]
    assert length_rewards(rewards, lengths) == [[0.7, 0.0, 0.0, 0.7]]
    assert length_rewards(rewards, lengths, correct_from=0.5) == [[0.7, 0.7, 0.0, 0.7]]


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.integers(1, 9000)), min_size=1, max_size=8),
        min_size=1,
        max_size=9,
    ),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_length_rewards_keep_right_above_wrong_and_short_above_long(batch, fraction, alpha):
    rewards = [[reward for reward, _ in group] for group in batch]
    lengths = [[length for _, length in group] for group in batch]
    touched = 0
    for group, shaped in zip(batch, length_rewards(rewards, lengths, fraction=fraction, alpha=alpha), strict=True):
        right = sorted((length, value) for (reward, length), value in zip(group, shaped, strict=True) if reward == 1)
        wrong = [value for (reward, _), value in zip(group, shaped, strict=True) if reward != 1]
        assert set(wrong) <= {0.0}
        assert all(1 - alpha <= value <= 1 for _, value in right)
        assert [value for _, value in right] == sorted((value for _, value in right), reverse=True)
        touched += any(value < 1 for _, value in right)
    assert touched <= max(1, round(fraction * len(batch)))
