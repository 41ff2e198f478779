"""The price of a ratio: its variance, its growth with the position, and the numbers that docs/theory.md prints."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.enumeration import (
    OBJECTIVES,
    RATIOS,
    VISIBLE,
    WORLDS,
    Policies,
    action_values,
    close,
    coin_log_ratio,
    coins,
    loss_weights,
    prefixes,
    product_policies,
    random_policies,
    true_gradient,
)

DOC = Path(__file__).parents[3] / "docs" / "theory.md"
SIGMA, BAND = 0.0387, (0.025, 0.05)  # a token's spread and CTPO's band at the first token, arXiv 2605.07331
WINDOW = 10.0  # times that band: what the band is at the hundredth token, as a fixed window


@pytest.fixture(params=WORLDS, ids=str)
def world(request: pytest.FixtureRequest) -> Policies:
    return random_policies(*request.param)


def variance(world: Policies, values: Tensor) -> Tensor:
    """Exact variances under mu of values [N, ...]."""
    return world.mean((values - world.mean(values)).square())


def chi_square(world: Policies) -> Tensor:
    """[T] variance under mu of each token's own ratio."""
    return variance(world, RATIOS["token"](world.log_ratio))


# ---- ratios


def test_every_further_token_adds_variance(world: Policies) -> None:
    spread = variance(world, RATIOS["cumulative"](world.log_ratio))
    assert bool((spread.diff() > VISIBLE).all())
    close(spread[-1], variance(world, RATIOS["sequence"](world.log_ratio))[0])
    last = torch.zeros(len(world.pi), 1, dtype=torch.bool)
    last[prefixes(world.vocab, world.horizon - 1) :] = True
    same = dataclasses.replace(world, pi=torch.where(last, world.mu, world.pi))  # nothing to add where the policies agree
    close(variance(same, RATIOS["cumulative"](same.log_ratio))[-1], spread[-2])


def test_a_geometric_mean_does_not_gain_variance_with_the_position() -> None:
    means = [variance(w, RATIOS["geometric mean"](w.log_ratio)) for w in (random_policies(*each) for each in WORLDS)]
    assert all(bool((each.diff() < 0).any()) for each in means)


def test_variance_of_independent_ratios_is_a_product(world: Policies) -> None:
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    independent = product_policies(logits[0] + 0.5 * logits[1], logits[0])
    probs = torch.softmax(independent.pi, 1), torch.softmax(independent.mu, 1)
    depth = torch.repeat_interleave(torch.arange(6), 3 ** torch.arange(6))
    first = torch.tensor([int((depth == t).nonzero()[0]) for t in range(6)])
    by_table = (probs[0].square() / probs[1]).sum(1)[first] - 1
    close(chi_square(independent), by_table)
    spread = variance(independent, RATIOS["cumulative"](independent.log_ratio))
    close(spread, (1 + by_table).cumprod(0) - 1)
    spread = variance(world, RATIOS["cumulative"](world.log_ratio))  # tokens that depend on each other
    assert float((spread - ((1 + chi_square(world)).cumprod(0) - 1))[1:].abs().min()) > 1e-6


def test_ratio_of_variances_for_equal_tokens_and_its_limits() -> None:
    horizon = 7
    for pi, mu in ((0.6, 0.45), (0.9, 0.02), (0.5 + 1e-3, 0.5)):
        world = product_policies(coins(*[pi] * horizon), coins(*[mu] * horizon))
        delta = pi**2 / mu + (1 - pi) ** 2 / (1 - mu) - 1
        spread = variance(world, RATIOS["cumulative"](world.log_ratio))
        ratio = spread[-1] / spread
        t = torch.arange(1, horizon + 1, dtype=torch.float64)
        torch.testing.assert_close(ratio, ((1 + delta) ** horizon - 1) / ((1 + delta) ** t - 1), rtol=1e-9, atol=0)
        if delta > 10:
            torch.testing.assert_close(ratio[3:], (1 + delta) ** (horizon - t[3:]), rtol=2 * delta**-4, atol=0)
        if delta < 1e-4:
            torch.testing.assert_close(ratio, horizon / t, rtol=horizon * delta, atol=0)


# ---- gradient estimators


def test_shorter_products_make_calmer_estimators_of_a_tabular_policy(world: Policies) -> None:
    at = world.at(torch.randn(*world.pi.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    prefix, whole = (world.variance(RATIOS[name](world.log_ratio) * at) for name in ("cumulative", "sequence"))
    assert prefix < whole - VISIBLE


def test_but_not_necessarily_where_positions_share_parameters() -> None:
    """One parameter for two coins, and advantages, functions of the prefix, whose terms cancel within each sequence."""
    pi, mu = 0.6, 0.4
    world = product_policies(coins(pi, pi), coins(mu, mu))
    score = world.tokens - pi  # gradient of log pi with respect to the one logit
    first = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)[world.tokens[:, 0]][:, 0]
    advantages = torch.stack([first, -first * score[:, 0] / score[:, 1]], dim=1)
    estimate = {name: (RATIOS[name](world.log_ratio) * advantages * score).sum(1) for name in ("cumulative", "sequence")}
    close(world.mean(estimate["cumulative"]), world.mean(estimate["sequence"]))
    close(variance(world, estimate["sequence"]), 0.0)
    assert float(variance(world, estimate["cumulative"])) > 0.1


# ---- growth with the position


def test_log_ratio_of_independent_tokens_has_variance_and_drift_in_proportion_to_the_position() -> None:
    logits = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    world = product_policies((logits[0] + 0.5 * logits[1]).expand(6, 3), logits[0].expand(6, 3))
    total = world.log_ratio.cumsum(1)
    t = torch.arange(1, 7)
    one = torch.log_softmax(world.pi[0], 0) - torch.log_softmax(world.mu[0], 0)
    probs = torch.softmax(world.mu[0], 0)
    kl = -(probs @ one)
    close(variance(world, total), t * (probs @ (one + kl).square()))
    close(world.mean(total), -t * kl)


def test_dependent_tokens_add_variances_up_to_third_order(world: Policies) -> None:
    """A token's log-ratio has the mean -KL(mu || pi) at its prefix: that mean alone ties it to the tokens before it."""
    log_mu = torch.log_softmax(world.mu, 1)
    kl = (log_mu.exp() * (log_mu - torch.log_softmax(world.pi, 1))).sum(1)[world.rows]
    d = world.log_ratio
    outer = world.mean(d.unsqueeze(2) * d.unsqueeze(1)) - world.mean(d)[:, None] * world.mean(d)
    by_kl = -(world.mean(d.unsqueeze(2) * kl.unsqueeze(1)) - world.mean(d)[:, None] * world.mean(kl))
    above = torch.ones_like(outer).triu(1).bool()
    close(outer[above], by_kl[above])
    assert float(outer[above].abs().max()) > VISIBLE  # so the variance is not the sum


@pytest.mark.parametrize(("vocab", "horizon", "seed"), WORLDS)
def test_that_third_order(vocab: int, horizon: int, seed: int) -> None:
    def excess(distance: float) -> float:
        world = random_policies(vocab, horizon, seed, distance)
        return float(variance(world, world.log_ratio.sum(1)) - variance(world, world.log_ratio).sum())

    assert excess(2e-3) / excess(1e-3) == pytest.approx(8, rel=0.02)


def test_counting_heads_agrees_with_enumeration() -> None:
    heads = (1 + math.tanh(0.3)) / 2
    world = product_policies(coins(*[heads] * 7), coins(*[0.5] * 7))
    for t in range(1, 8):
        log_ratio, prob = coin_log_ratio(0.3, t)
        count = world.tokens[:, :t].sum(1)
        close(world.log_ratio[:, :t].sum(1), log_ratio[count])
        close(torch.zeros(t + 1, dtype=torch.float64).index_add(0, count, world.prob(world.mu)), prob)


def outside(log_ratio: Tensor, prob: Tensor, scale: float) -> tuple[float, float]:
    """Probabilities below and above CTPO's band at the first token times `scale`."""
    return float(prob[log_ratio < -BAND[0] * scale].sum()), float(prob[log_ratio > BAND[1] * scale].sum())


def normal_tail(z: float) -> float:
    return 0.5 * math.erfc(z / math.sqrt(2))


def test_a_sqrt_band_about_the_mean_keeps_its_clip_probability_and_a_fixed_window_does_not() -> None:
    expected = normal_tail(BAND[0] / SIGMA) + normal_tail(BAND[1] / SIGMA)  # at every position
    fixed, drifting = [], []
    for t in (50, 200, 800, 3200, 12800):
        log_ratio, prob = coin_log_ratio(SIGMA, t)
        close(prob.sum(), 1.0, 1e-10)
        about_mean = sum(outside(log_ratio - prob @ log_ratio, prob, math.sqrt(t)))
        # a lattice distribution follows the normal one to within its largest atom at either edge
        assert abs(about_mean - expected) < 2 * float(prob.max())
        fixed.append(sum(outside(log_ratio, prob, WINDOW)))
        drifting.append(outside(log_ratio, prob, math.sqrt(t))[0])
    assert fixed == sorted(fixed)
    assert fixed[0] < 0.3 < 0.98 < fixed[-1]
    # what is clipped is not taken about the mean: -t KL outgrows sqrt(t), and the lower side ends up clipping all
    assert drifting == sorted(drifting)
    assert drifting[0] < 0.4 < 0.9 < drifting[-1]


# ---- the numbers of the document


def example(distance: float) -> Policies:
    """Three words, six tokens, no random numbers: see "The example" in the document."""
    row = torch.arange(prefixes(3, 6), dtype=torch.float64)[:, None]
    word = torch.arange(3, dtype=torch.float64)
    mu = torch.sin(1 + 2 * row + 3 * word)
    return Policies(mu + distance * torch.sin(2 + 5 * row + 7 * word), mu, 6)


def signals(world: Policies) -> tuple[Tensor, Tensor, Tensor]:
    """The true gradient, and the two signals [N, T]: pi's advantage of the token, the outcome less mu's expectation."""
    reward = (world.tokens.sum(1) > 6).to(torch.float64)
    values = action_values(world, world.pi, reward)
    advantages = values - (torch.softmax(world.pi, 1) * values).sum(1, keepdim=True)
    outcome = (reward - world.mean(reward))[:, None].expand(-1, world.horizon)
    return true_gradient(world, reward), world.at(advantages), outcome


def example_rows() -> list[list[str | float]]:
    rows: list[list[str | float]] = []
    for distance in (0.5, 0.1):
        world = example(distance)
        reward = (world.tokens.sum(1) > 6).to(torch.float64)
        spread = variance(world, world.log_ratio)
        chi = variance(world, RATIOS["sequence"](world.log_ratio))[0]
        norm = signals(world)[0].norm()
        rows.append([str(distance), world.mean(reward), world.prob(world.pi) @ reward, norm, spread.mean().sqrt(), chi])
    return rows


def estimator_rows() -> list[list[str | float]]:
    world = example(0.5)
    target, advantages, outcome = signals(world)
    whole = world.variance(RATIOS["sequence"](world.log_ratio) * outcome)
    rows: list[list[str | float]] = []
    for name, ratio in RATIOS.items():
        row: list[str | float] = [name]
        for signal in (advantages, outcome):
            weights = ratio(world.log_ratio) * signal
            bias, spread = float((world.gradient(weights, world.mu) - target).norm()), world.variance(weights)
            row += [bias, spread]
        rows.append([*row, math.nan if name == "sequence" else (whole - spread) / bias**2])
    return rows


def clip_rows() -> list[list[str | float]]:
    world = example(0.1)
    target, *both = signals(world)
    rows: list[list[str | float]] = []
    for name in ("x 1", "x 2", "x 4", "x 1, no dual", "x 2, no dual", "none"):
        objective = OBJECTIVES["cumulative"]
        if name != "none":
            low, high = (bound * int(name[2]) for bound in BAND)
            dual = None if "no dual" in name else high
            objective = {"type": "ctpo", "clip_low": low, "clip_high": high, "dual_clip": dual}
        row: list[str | float] = [name]
        for signal in both:
            weights = loss_weights(objective, world, signal)
            mean = world.gradient(weights, world.mu)
            cosine = (mean * target).sum() / mean.norm() / target.norm()
            clipped = world.mean(((weights == 0) & (signal.abs() > 1e-9)).to(torch.float64)).mean()
            row += [(mean - target).norm(), cosine, world.variance(weights), clipped]
        rows.append(row)
    return rows


def coin_rows() -> list[list[str | float]]:
    rows: list[list[str | float]] = []
    for t in (1, 10, 100, 1000, 4000, 8000):
        log_ratio, prob = coin_log_ratio(SIGMA, t)
        mean = prob @ log_ratio
        row: list[str | float] = [str(t), mean / (SIGMA * math.sqrt(t))]
        for values, scale in ((log_ratio, WINDOW), (log_ratio, math.sqrt(t)), (log_ratio - mean, math.sqrt(t))):
            row += outside(values, prob, scale)
        rows.append(row)
    return rows


TABLES = {"example": example_rows, "estimators": estimator_rows, "clipping": clip_rows, "coins": coin_rows}


def printed(name: str) -> list[list[str]]:
    """Body cells of the document's table that follows the mark `name`."""
    table = DOC.read_text(encoding="utf-8").split(f"<!-- table: {name} -->\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("name", TABLES)
def test_the_document_prints_what_is_computed(name: str) -> None:
    rows, cells = TABLES[name](), printed(name)
    assert [row[0] for row in rows] == [re.sub(r"[`*]", "", line[0]) for line in cells]
    for row, line in zip(rows, cells, strict=True):
        for value, cell in zip(row[1:], line[1:], strict=True):
            if math.isnan(float(value)):
                assert cell == ""
                continue
            half_unit = 0.5 * 10.0 ** -len(cell.partition(".")[2])
            assert float(cell) == pytest.approx(float(value), abs=half_unit + 1e-9, rel=0), (name, row[0], cell, float(value))
