"""pass@k and maj@k against a look at every choice of k attempts; the interval's coverage against problems that are drawn."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.loop.evaluation.estimators import bootstrap, ks, maj_at, pass_at

VOTES = st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, None]), min_size=1, max_size=8)  # 0 is the right answer, None is none


def pass_by_choices(k: int, votes: list[int | None]) -> float:
    """The share of all choices of k attempts in which one is right."""
    choices = list(combinations(votes, k))
    return sum(0 in choice for choice in choices) / len(choices)


def maj_by_choices(k: int, votes: list[int | None]) -> float:
    """The mean over all choices of the chance that a draw among the most frequent answers gives the right one."""
    total, choices = 0.0, list(combinations(votes, k))
    for choice in choices:
        counts = Counter(vote for vote in choice if vote is not None)
        most = [vote for vote, count in counts.items() if count == max(counts.values())]
        total += (0 in most) / len(most) if most else 0.0
    return total / len(choices)


def estimated(k: int, votes: list[int | None]) -> float:
    wrong = [votes.count(each) for each in (1, 2, 3)]
    (found,) = maj_at([k], votes.count(0), [size for size in wrong if size], votes.count(None))
    return found


@given(VOTES)
def test_every_choice_of_attempts_counts_once(votes: list[int | None]) -> None:
    for k in range(1, len(votes) + 1):
        assert pass_at(k, len(votes), votes.count(0)) == pytest.approx(pass_by_choices(k, votes), abs=1e-12)
        assert estimated(k, votes) == pytest.approx(maj_by_choices(k, votes), abs=1e-12)


@pytest.mark.parametrize(
    ("votes", "chance"),
    [
        ([0, 1], 1 / 2),
        ([0, 0, 1, 1, 2, 2], 1 / 3),
        ([0, 0, 1, 1, 2], 1 / 2),
        ([0, None, None, None], 1.0),  # who gives no answer does not vote
        ([None, None], 0.0),
        ([0, 1, 1], 0.0),
        ([0, 0, 1], 1.0),
    ],
)
def test_ties_are_drawn(votes: list[int | None], chance: float) -> None:
    """Of all attempts there is one choice only."""
    assert estimated(len(votes), votes) == pytest.approx(chance)


def test_one_of_one_is_the_mean_and_many_do_not_overflow() -> None:
    assert pass_at(1, 8, 3) == maj_at([1], 3, [2, 1], 2)[0] == 3 / 8
    assert maj_at(ks(1024), 1, [], 1023) == pytest.approx([k / 1024 for k in ks(1024)])
    assert maj_at(ks(64), 32, [32], 0) == pytest.approx([0.5] * 6)
    assert pass_at(1024, 1024, 1) == 1.0


@pytest.mark.parametrize(
    ("samples", "wanted"), [(1, []), (2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (32, [2, 4, 8, 16, 32]), (12, [2, 4, 8, 12])]
)
def test_which_k(samples: int, wanted: list[int]) -> None:
    assert ks(samples) == wanted


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Problems of a random difficulty, 30 of them with 8 attempts each, many times: a percentile interval of 95 % falls a little
    short of that for so few problems, and one that left the attempts or the problems out would fall short by far."""
    rng, covered, width = np.random.default_rng(7), 0, []
    times, problems, attempts = 400, 30, 8
    for number in range(times):
        difficulty = rng.beta(0.8, 1.2, problems)  # mean 0.4
        outcomes = rng.binomial(attempts, difficulty) / attempts
        low, high = bootstrap(outcomes[:, None], seed=number, resamples=500)
        covered += low[0] <= 0.4 <= high[0]
        width.append(high[0] - low[0])
    assert 0.91 <= covered / times <= 0.97
    spread = np.sqrt(
        (0.4 * 0.6 / 3 + (0.4 - 0.4**2 - 0.4 * 0.6 / 3) / attempts) / problems
    )  # of the mean, by the variance of beta
    assert np.mean(width) == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_the_interval_is_seeded_and_of_each_column_alone() -> None:
    outcomes = np.random.default_rng(0).random((12, 3))
    first, again = (np.array(bootstrap(outcomes, seed=3, resamples=1_500)) for _ in range(2))
    assert (first == again).all()
    assert (first != np.array(bootstrap(outcomes, seed=4, resamples=1_500))).all()
    alone = np.array(bootstrap(outcomes[:, 1:2], seed=3, resamples=1_500))
    assert first[:, 1:2] == pytest.approx(alone)
    assert np.array(bootstrap(outcomes[:1], seed=1)) == pytest.approx(np.array([outcomes[0], outcomes[0]]))
