"""Truncated sampling by exact sums over every sequence: which ratio is unbiased, what grows otherwise (docs/truncation.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctpo_megatron.types import Truncation
from tests.support.enumeration import (
    OBJECTIVES,
    RATIOS,
    VISIBLE,
    WORLDS,
    Policies,
    close,
    loss_weights,
    occupancy,
    random_policies,
    tree_gradient,
    true_gradient,
)

NEVER = 1e4  # taken off a logit: exp(-NEVER) is 0 in float64, and differences of such logits are still finite
CUTS = [Truncation(top_k=2), Truncation(top_p=0.8), Truncation(min_p=0.4), Truncation(top_p=0.9, top_k=3, min_p=0.05)]
PAGE = Path(__file__).parents[3] / "docs" / "truncation.md"


def kept(logits: Tensor, cut: Truncation) -> Tensor:
    """[S, V] bool, the support: as SGLang 0.5.23's sampler in torch cuts the sorted probabilities."""
    probs, order = torch.softmax(logits, 1).sort(1, descending=True)
    before = probs.cumsum(1) - probs
    keep = (torch.arange(probs.shape[1]) < (cut.top_k or probs.shape[1])) & (before <= cut.top_p)
    keep &= probs >= probs[:, :1] * cut.min_p
    return torch.zeros_like(keep).scatter(1, order, keep)


@dataclass(frozen=True)
class Truncated:
    """A world whose sequences are drawn from a truncated mu."""

    whole: Policies
    support: Tensor  # [S, V] bool, of mu

    @property
    def cut(self) -> Policies:
        """Both policies cut to mu's support: what is drawn, and what the ratio is taken of."""
        return Policies(*(logits - NEVER * ~self.support for logits in (self.whole.pi, self.whole.mu)), self.whole.horizon)

    def mass(self, logits: Tensor) -> Tensor:
        """[S] the support's probability under a table of logits."""
        return (torch.softmax(logits, 1) * self.support).sum(1)


@pytest.fixture(params=CUTS, ids=str)
def truncated(request: pytest.FixtureRequest) -> Truncated:
    world = random_policies(4, 4, 4)
    return Truncated(world, kept(world.mu, request.param))


def values_of(world: Policies, seed: int = 7) -> Tensor:
    return torch.randn(world.pi.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_cut_cuts(cut: Truncation) -> None:
    world = random_policies(4, 4, 4)
    counts = kept(world.mu, cut).sum(1)
    assert counts.min() >= 1
    assert counts.float().mean() < 4
    assert counts.max() > 1


def test_without_truncation_the_identity_holds_as_it_is() -> None:
    """Temperature 1, the whole vocabulary: the mass is 1, and a prefix's ratio has mean 1 at every position."""
    for size in WORLDS:
        world = random_policies(*size)
        everything = Truncated(world, kept(world.mu, Truncation()))
        close(everything.mass(world.mu), torch.ones(len(world.mu)))
        assert torch.equal(everything.cut.log_ratio, world.log_ratio)
        close(world.mean(world.log_ratio.cumsum(1).exp()), torch.ones(world.horizon))


def test_the_log_prob_of_the_sampling_distribution_is_the_log_prob_less_the_log_mass(truncated: Truncated) -> None:
    world, cut = truncated.whole, truncated.cut
    drawn = cut.prob(cut.mu) > 0
    for logits, of in ((world.mu, cut.mu), (world.pi, cut.pi)):
        expected = world.logp(logits) - truncated.mass(logits)[world.rows].log()
        close(cut.logp(of)[drawn], expected[drawn])
    close(cut.prob(cut.mu).sum(), 1.0)


def test_with_both_policies_cut_to_the_support_ratios_are_unbiased(truncated: Truncated) -> None:
    """Everything that theory.md says of two policies holds of the two that are cut."""
    world, advantages = truncated.cut, values_of(truncated.whole)
    close(world.mean(world.log_ratio.cumsum(1).exp()), torch.ones(world.horizon))
    at = world.at(advantages)
    target = world.gradient(at, world.pi)
    close(target, tree_gradient(world, occupancy(world, world.pi), advantages))
    for name in ("cumulative", "sequence"):
        close(world.gradient(RATIOS[name](world.log_ratio) * at, world.mu), target)
        close(world.gradient(loss_weights(OBJECTIVES[name], world, at), world.mu), target)
    reward = torch.randn(len(world.tokens), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    close(world.gradient(RATIOS["sequence"](world.log_ratio) * reward[:, None], world.mu), true_gradient(world, reward))


def test_the_first_step_follows_the_truncated_policys_own_reward(truncated: Truncated) -> None:
    """Where pi is mu: the gradient is that of E[R] when pi itself is truncated, though pi's own support moves with it.

    A difference quotient of the reward of the policy that is truncated anew at each point says so; ties have probability 0.
    """
    world = truncated.whole
    here = Truncated(Policies(world.mu, world.mu, world.horizon), truncated.support).cut
    reward = torch.randn(len(world.tokens), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradient = here.gradient(reward[:, None].expand_as(here.log_ratio), here.mu)
    direction = values_of(world, seed=8)

    def value(step: float) -> Tensor:
        moved = world.mu + step * direction
        return here.prob(moved - NEVER * ~truncated.support) @ reward

    assert torch.equal(kept(world.mu + 1e-6 * direction, CUTS[0]), kept(world.mu, CUTS[0]))
    close((value(1e-5) - value(-1e-5)) / 2e-5, (gradient * direction).sum(), atol=1e-8)


def test_without_the_cure_a_prefix_ratio_is_off_by_the_masses(truncated: Truncated) -> None:
    """Log-probs of the whole distributions: each token multiplies the mean by mass_pi / mass_mu of its prefix."""
    world, cut = truncated.whole, truncated.cut
    factors = (truncated.mass(world.pi) / truncated.mass(world.mu))[world.rows]
    at_pi = cut.prob(cut.pi)
    for t in range(world.horizon):
        biased = cut.mean(world.log_ratio[:, : t + 1].sum(1).exp())
        close(biased, at_pi @ factors[:, : t + 1].prod(1))
    assert abs(float(cut.mean(world.log_ratio.sum(1).exp())) - 1) > VISIBLE


def test_without_the_cure_a_constant_advantage_has_a_gradient(truncated: Truncated) -> None:
    """Where pi is mu and every ratio 1: the score of whole log-probs has another mean than 0 under what was drawn."""
    world = Policies(truncated.whole.mu, truncated.whole.mu, truncated.whole.horizon)
    cut, ones = Truncated(world, truncated.support).cut, torch.ones_like(world.log_ratio)
    assert float(world.gradient(ones, cut.mu).norm()) > VISIBLE
    close(cut.gradient(ones, cut.mu), torch.zeros_like(world.mu))


def test_curing_the_engines_log_probs_alone_is_worse(truncated: Truncated) -> None:
    """The ratio pi / (mu / mass): even where pi is mu its prefix product shrinks like the product of masses."""
    world, cut = truncated.whole, truncated.cut
    masses = truncated.mass(world.mu)[world.rows]
    here = cut.mean(masses.cumprod(1))
    assert (here.diff() <= 0).all()
    assert here[-1] < 1 - 10 * VISIBLE


def drift(mass: float, moved: float, tokens: int) -> dict[str, float]:
    """Means of a prefix ratio after `tokens` independent tokens: support of `mass` under mu and `moved` under pi."""
    return {"whole": (moved / mass) ** tokens, "engine's alone": moved**tokens, "both cut": 1.0}


def test_the_table_of_the_page() -> None:
    """Its rows, and the formula against sums over all sequences of independent tokens."""
    pi, mu = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.6, 0.361, 0.039], [0.55, 0.41, 0.04]))
    states = sum(3**t for t in range(6))
    world = Policies(pi.expand(states, 3), mu.expand(states, 3), 6)
    cut = Truncated(world, kept(world.mu, Truncation(top_k=2)))
    expected = drift(0.96, 0.961, 6)
    close(cut.cut.mean(world.log_ratio.sum(1).exp()), expected["whole"])
    close(cut.cut.mean((world.log_ratio + math.log(0.96)).sum(1).exp()), expected["engine's alone"])
    close(cut.cut.mean(cut.cut.log_ratio.sum(1).exp()), 1.0)
    rows = []
    for tokens in (1, 10, 100, 1000, 8000):
        means = drift(0.96, 0.961, tokens)
        rows.append(f"| {tokens} | " + " | ".join(f"{each:.3g}" for each in means.values()) + " |")
    table = PAGE.read_text().partition("<!-- table: masses -->\n")[2].split("\n\n")[0].splitlines()[2:]
    assert table == rows
