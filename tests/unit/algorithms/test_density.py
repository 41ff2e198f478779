"""Counts of log-ratios by position: by hand, and additive over parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ctpo_megatron.algorithms import algorithm_recipe, per_token, policy_loss, recipe_loss
from ctpo_megatron.algorithms.density import BUCKETS, FINEST, SIGNS, edges
from ctpo_megatron.algorithms.health import POSITION_BINS
from ctpo_megatron.algorithms.statistics import Stats
from ctpo_megatron.config.algorithm import AlgorithmConfig

SHAPE = (2, SIGNS, POSITION_BINS, BUCKETS)


def stats_of(log_ratios: list[float], advantages: list[float], mask: list[int]) -> Stats:
    """Statistics of CTPO's loss on one sequence."""
    given = torch.tensor(log_ratios, dtype=torch.float64, requires_grad=True)
    return policy_loss(
        {"type": "ctpo"},
        logp=given,
        old_logp=torch.zeros(len(log_ratios), dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        mask=torch.tensor(mask, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, len(log_ratios)]),
    ).stats


def bucket(value: float, finest: float) -> int:
    """The bucket of a value, by looking for it."""
    borders = edges(finest)
    return next(place for place in range(BUCKETS) if borders[place] <= value < borders[place + 1])


def test_counts_by_hand() -> None:
    """Tokens 1, 2 and 3 have S = 0.1, -0.3, -0.3; what is masked counts nowhere."""
    stats = stats_of([0.1, 5.0, -0.4, 0.0], [1.0, 9.0, -2.0, 0.0], [1, 0, 1, 1])
    counts = stats.sums["health/density"].reshape(SHAPE).numpy()
    expected = np.zeros(SHAPE)
    for sign, position, value in ((2, 1, 0.1), (0, 2, -0.3), (1, 3, -0.3)):
        b = int(math.log2(position))
        expected[0, sign, b, bucket(value, FINEST[0])] += 1
        expected[1, sign, b, bucket(value / math.sqrt(position), FINEST[1])] += 1
    np.testing.assert_array_equal(counts, expected)
    # token 1 is above 0.05, token 2 below -0.025 sqrt(2)
    assert stats.sums["health/clipped"][:3].tolist() == [1.0, 1.0, 0.0]


def test_what_has_not_moved_is_in_the_middle_and_what_is_far_out_at_the_ends() -> None:
    stats = stats_of([1e-17, -1e-17, 20.0, -20.0, -20.0], [1.0] * 5, [1] * 5)
    counts = stats.sums["health/density"].reshape(SHAPE)[0].sum((0, 1))
    assert (counts[BUCKETS // 2], counts[0], counts[-1]) == (3, 1, 1)


def test_nothing_is_counted_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch; `test_fused` has the pass. The loss is the same."""
    asked = list[int]()
    count = per_token.density_counts
    monkeypatch.setattr(per_token, "density_counts", lambda tokens: asked.append(1) or count(tokens))
    given = {
        "logp": torch.tensor([0.1, -0.2], dtype=torch.float64, requires_grad=True),
        "old_logp": torch.zeros(2, dtype=torch.float64),
        "advantages": torch.ones(2, dtype=torch.float64),
        "mask": torch.ones(2, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 2]),
    }
    found = {
        density: recipe_loss(algorithm_recipe(AlgorithmConfig(), density=density), rollout_logp=given["old_logp"], **given)
        for density in (False, True)
    }
    assert len(asked) == 1
    assert found[True].stats.sums.keys() - found[False].stats.sums.keys() == {"health/density"}
    assert found[True].loss == found[False].loss


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    given = (list(rng.normal(0, 0.1, 100)), list(rng.normal(0, 1, 100)), list(rng.integers(0, 2, 100)))
    whole = stats_of(*given).sums["health/density"]
    monkeypatch.setattr(per_token, "PART", 7)
    assert torch.equal(stats_of(*given).sums["health/density"], whole)
    assert whole.sum() == 2 * sum(given[2])
