"""What corrections of the trainer/engine mismatch leave of long trajectories, by level: docs/mismatch.md.

Per-token noise e = log old - log rollout is normal, N(-s^2/2, s^2): then E[exp e] = 1, as it is for tokens that the engine drew.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import pytest
import torch

from ctpo_megatron.algorithms import policy_loss
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.loop.health import effective_sample_size
from ctpo_megatron.loop.shrinking import ShrinkingAlarm

LEVELS = ("token", "geometric", "prefix", "sequence")
CAP, LONG = 5.0, 10_000  # the cap of CTPO's published script, a long trajectory's tokens
PAGE = Path(__file__).parents[3] / "docs" / "mismatch.md"
PHI = NormalDist().cdf


class Left(NamedTuple):
    """What a weight leaves: its mean, and its effective share."""

    mean: float
    share: float


def capped_moments(variance: float, mean: float) -> tuple[float, float]:
    """E[w] and E[w^2] of w = min(exp(x), CAP), x ~ N(mean, variance)."""
    s, over = math.sqrt(variance), math.log(CAP)
    beyond = 1 - PHI((over - mean) / s)
    first = math.exp(mean + variance / 2) * PHI((over - mean - variance) / s) + CAP * beyond
    second = math.exp(2 * mean + 2 * variance) * PHI((over - mean - 2 * variance) / s) + CAP**2 * beyond
    return first, second


def expected(level: str, sigma: float, tokens: int) -> Left:
    """In the limit of many sequences of `tokens` tokens."""
    v = sigma * sigma
    if level == "prefix":
        each = [capped_moments(t * v, -t * v / 2) for t in range(1, tokens + 1)]
    else:
        variance = {"token": v, "geometric": v / tokens, "sequence": tokens * v}[level]
        each = [capped_moments(variance, {"sequence": -variance / 2}.get(level, -v / 2))]
    first, second = (sum(moments) / len(each) for moments in zip(*each, strict=True))
    return Left(first, first * first / second)


def measured(level: str, sigma: float, tokens: int, sequences: int) -> dict[str, float]:
    """The statistics of `policy_loss` with a policy that has hardly moved: its ratios are 1.0001."""
    noise = torch.randn(sequences * tokens, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    old = torch.full_like(noise, -2.0)
    out = policy_loss(
        {"type": "grpo"},
        logp=(old + 1e-4).requires_grad_(),
        old_logp=old,
        rollout_logp=old - (sigma * noise - sigma * sigma / 2),
        advantages=torch.ones_like(old),
        mask=torch.ones_like(old, dtype=torch.bool),
        cu_seqlens=torch.arange(sequences + 1) * tokens,
        correction={"type": "truncate", "level": level, "high": CAP},
    )
    means = {name: float(mean.total / mean.weight) for name, mean in out.stats.means.items()}
    weights = out.stats.means["correction"]
    squares = out.stats.means["correction_sq"].total
    share = effective_sample_size(float(weights.total), float(squares), float(weights.weight))
    return means | {
        "share": share,
        "before_max": float(out.stats.maxima["correction_before_max"]),
        "loss": float(out.loss.detach()),
    }


def test_one_weight_for_all_shrinks_a_batch_of_long_trajectories() -> None:
    """A mean near 0.05 although the policy has not moved: the loss, whose every advantage is 1, is as much smaller."""
    found = measured("sequence", 0.05, LONG, sequences=64)
    assert found["ratio"] == pytest.approx(1.0001, abs=1e-6)
    assert found["correction"] < 0.1
    assert found["correction_log"] == pytest.approx(-12.5, abs=2)
    assert found["loss"] == pytest.approx(-found["correction"], rel=1e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_level_leaves_is_what_noise_leaves_of_it(level: str) -> None:
    found, left = measured(level, 0.05, LONG, sequences=64), expected(level, 0.05, LONG)
    error = 4 * math.sqrt((left.mean**2 / left.share - left.mean**2) / 64)
    assert abs(found["correction"] - left.mean) <= error
    free = level in ("token", "geometric")
    assert (found["correction"] > 0.99) == free
    assert (found["share"] > 0.99) == free
    assert found["before_max"] < CAP or not free


def test_without_a_cap_the_mean_is_right_and_a_few_sequences_are_all_of_it() -> None:
    """So that lifting the cap is no way out: exp(-T s^2) of the sequences would carry the batch."""
    v = 1000 * 0.05**2
    assert math.isclose(math.exp(-v / 2 + v / 2), 1.0)
    found = measured("sequence", 0.05, 1000, sequences=400)
    assert found["correction_before"] == pytest.approx(1.0, abs=1.0)
    assert found["before_max"] > 8
    assert math.exp(-v) == pytest.approx(0.08, abs=0.01)


def test_the_table_of_the_page() -> None:
    rows = []
    for sigma in (0.01, 0.02, 0.05):
        for tokens in (100, 1000, LONG):
            left = [expected(level, sigma, tokens) for level in LEVELS]
            rows.append(f"| {sigma:g} | {tokens:,} | " + " | ".join(f"{each.mean:.3f}, {each.share:.3f}" for each in left) + " |")
    table = PAGE.read_text().partition("<!-- table: levels -->\n")[2].split("\n\n")[0].splitlines()[2:]
    assert table == rows


def test_the_alarm_names_the_weights_once_until_they_recover() -> None:
    algorithm = AlgorithmConfig.model_validate({"correction": {"type": "truncate", "level": "sequence"}})
    alarm = ShrinkingAlarm(algorithm)
    low = {"train/correction": 0.06, "health/correction_sample_size": 0.3, "train/correction_log": -12.5}
    assert alarm.step(1, low | {"train/correction": 0.9}) == []
    (event,) = alarm.step(2, low)
    assert (event.step, event.metric, event.limit) == (2, "train/correction", 0.5)
    assert "algorithm.correction.level=geometric or token" in event.sentence
    assert "-12.5 nats" in event.sentence
    assert alarm.step(3, low) == []
    assert alarm.step(4, low | {"train/correction": 0.6}) == []
    (again,) = alarm.step(5, low)
    assert again.step == 5
    assert [each.metric for each in alarm.step(6, low | {"health/correction_sample_size": 0.01})] == [
        "health/correction_sample_size"
    ]


@pytest.mark.parametrize(
    ("correction", "words"),
    [
        ("{type: truncate, level: token}", "look at drift/mean"),
        ("{type: mask, level: geometric, low: 0.99, high: 1.01}", "[0.99, 1.01] count as 0: widen the range"),
        ("{type: icepop}", "algorithm.correction.type=truncate"),
    ],
)
def test_the_advice_is_for_the_correction_at_hand(correction: str, words: str) -> None:
    import yaml

    alarm = ShrinkingAlarm(AlgorithmConfig.model_validate({"correction": yaml.safe_load(correction)}))
    (event,) = alarm.step(1, {"train/correction": 0.1})
    assert words in event.sentence


def test_runs_without_a_correction_and_bounds_of_zero_are_left_alone() -> None:
    assert ShrinkingAlarm(AlgorithmConfig()).step(1, {"train/loss": 1.0}) == []
    off = {"correction": {"type": "icepop"}, "correction_alarm": {"mean": 0, "sample_size": 0}}
    assert ShrinkingAlarm(AlgorithmConfig.model_validate(off)).step(1, {"train/correction": 0.0}) == []
