"""What an importance ratio corrects and what it does not, by exact sums over every sequence: docs/theory.md."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from ctpo_megatron.algorithms import LocalScan, group_advantages, policy_loss
from tests.support.enumeration import (
    OBJECTIVES,
    RATIOS,
    VISIBLE,
    WORLDS,
    Policies,
    action_values,
    close,
    coins,
    loss_weights,
    occupancy,
    product_policies,
    random_policies,
    tree_gradient,
    true_gradient,
)

UNBIASED = ("cumulative", "sequence")
BIASED = ("none", "token", "geometric mean", "sequence mean", "prefix minimum")


@pytest.fixture(params=WORLDS, ids=str)
def world(request: pytest.FixtureRequest) -> Policies:
    return random_policies(*request.param)


def normal(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differs(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) > VISIBLE


def advantage_of(world: Policies, logits: Tensor, reward: Tensor) -> Tensor:
    """[S, V] action values minus the prefix's value, both of the policy `logits`."""
    values = action_values(world, logits, reward)
    return values - (torch.softmax(logits, 1) * values).sum(1, keepdim=True)


def depth(world: Policies) -> Tensor:
    """[S] tokens before each prefix's next token."""
    return torch.repeat_interleave(torch.arange(world.horizon), world.vocab ** torch.arange(world.horizon))


# ---- the yardsticks themselves


def test_enumeration_is_complete_and_its_recursions_agree_with_it(world: Policies) -> None:
    assert len({tuple(s.tolist()) for s in world.tokens}) == world.vocab**world.horizon
    close(world.prob(world.mu).sum(), 1.0)
    close(world.mean(world.log_ratio.sum(1).exp()), 1.0)
    visits = torch.zeros(len(world.pi), dtype=torch.float64).index_add(
        0, world.rows.flatten(), world.prob(world.mu).repeat_interleave(world.horizon)
    )
    close(occupancy(world, world.mu), visits)
    reward = normal(len(world.tokens))
    root = action_values(world, world.pi, reward)[0] @ torch.softmax(world.pi[0], 0)
    close(root, world.prob(world.pi) @ reward)
    logits = world.pi.clone().requires_grad_()
    weights = normal(*world.tokens.shape)
    surrogate = world.prob(world.mu) @ (weights * world.logp(logits)).sum(1)
    close(world.gradient(weights, world.mu), torch.autograd.grad(surrogate, logits)[0])


def test_variance_of_a_gradient_is_that_of_its_outer_products() -> None:
    world = random_policies(2, 3, 0)
    weights = normal(*world.tokens.shape)
    each = torch.zeros(len(world.tokens), *world.pi.shape, dtype=torch.float64)
    for n, (rows, terms) in enumerate(zip(world.rows, weights.unsqueeze(2) * world.score, strict=True)):
        each[n].index_add_(0, rows, terms)
    close(world.variance(weights), float(world.mean((each - world.mean(each)).square().sum((1, 2)))))


# ---- what a product of ratios corrects


def test_a_product_of_ratios_draws_its_positions_from_pi_and_leaves_the_others_to_mu(world: Policies) -> None:
    values = normal(len(world.tokens))
    for first, last in itertools.combinations(range(world.horizon + 1), 2):
        inside = (depth(world) >= first) & (depth(world) < last)
        spliced = torch.where(inside[:, None], world.pi, world.mu)
        ratio = world.log_ratio[:, first:last].sum(1).exp()
        close(world.mean(ratio * values), world.prob(spliced) @ values)


def test_cumulative_ratio_is_unbiased_for_a_function_of_the_prefix(world: Policies) -> None:
    advantages = normal(*world.pi.shape)
    at = world.at(advantages)
    target = world.gradient(at, world.pi)
    close(target, tree_gradient(world, occupancy(world, world.pi), advantages))
    for name in UNBIASED:
        close(world.gradient(RATIOS[name](world.log_ratio) * at, world.mu), target)
    for name in BIASED:
        assert differs(world.gradient(RATIOS[name](world.log_ratio) * at, world.mu), target), name
    shorter = (world.log_ratio.cumsum(1) - world.log_ratio).exp()  # the product without the token's own ratio
    assert differs(world.gradient(shorter * at, world.mu), target)
    own = world.gradient(RATIOS["token"](world.log_ratio) * at, world.mu)  # prefixes still come from mu
    close(own, tree_gradient(world, occupancy(world, world.mu), advantages))


def test_token_ratio_suffices_where_the_policies_reach_prefixes_equally_often(world: Policies) -> None:
    last = depth(world) == world.horizon - 1
    same_prefixes = dataclasses.replace(world, pi=torch.where(last[:, None], world.pi, world.mu))
    at = world.at(normal(*world.pi.shape))
    target = same_prefixes.gradient(at, same_prefixes.pi)
    close(same_prefixes.gradient(RATIOS["token"](same_prefixes.log_ratio) * at, world.mu), target)
    assert differs(same_prefixes.gradient(RATIOS["geometric mean"](same_prefixes.log_ratio) * at, world.mu), target)


def test_tool_tokens_need_no_ratio(world: Policies) -> None:
    """The environment writes the second token. What the model would have said there must not enter the product."""
    tool = depth(world) == 1
    environment = torch.where(tool[:, None], normal(*world.pi.shape, seed=8), 0.0)
    sampled = Policies(*(torch.where(tool[:, None], environment, logits) for logits in (world.pi, world.mu)), world.horizon)
    mask = torch.ones_like(world.tokens, dtype=torch.bool)
    mask[:, 1] = False
    at = world.at(normal(*world.pi.shape))
    target = sampled.gradient(at * mask, sampled.pi)
    close(sampled.gradient(loss_weights(OBJECTIVES["cumulative"], world, at, mask), sampled.mu), target)
    counted = loss_weights(OBJECTIVES["cumulative"], world, at) * mask
    assert differs(sampled.gradient(counted, sampled.mu), target)


# ---- a reward at the end


def test_cumulative_ratio_of_a_terminal_reward_values_the_suffix_as_mu_does(world: Policies) -> None:
    reward = normal(len(world.tokens))
    visits = {"pi": occupancy(world, world.pi), "mu": occupancy(world, world.mu)}
    values = {"pi": action_values(world, world.pi, reward), "mu": action_values(world, world.mu, reward)}
    got = {name: world.gradient(ratio(world.log_ratio) * reward[:, None], world.mu) for name, ratio in RATIOS.items()}
    close(got["token"], tree_gradient(world, visits["mu"], values["mu"]))
    close(got["cumulative"], tree_gradient(world, visits["pi"], values["mu"]))
    close(got["sequence"], tree_gradient(world, visits["pi"], values["pi"]))
    target = true_gradient(world, reward)
    close(got["sequence"], target)
    for name in ("cumulative", *BIASED):
        assert differs(got[name], target), name
    last = depth(world) == world.horizon - 1  # no suffix: nothing left to be wrong
    close(got["cumulative"][last], target[last])
    assert all(differs(got["cumulative"][depth(world) == t], target[depth(world) == t]) for t in range(world.horizon - 1))


def test_that_gap_is_of_first_order_in_the_distance_of_the_policies() -> None:
    def gap(distance: float) -> float:
        world = random_policies(3, 4, 2, distance)
        reward = normal(len(world.tokens))
        weights = RATIOS["cumulative"](world.log_ratio) * reward[:, None]
        return float((world.gradient(weights, world.mu) - true_gradient(world, reward)).norm())

    assert gap(2e-3) / gap(1e-3) == pytest.approx(2, rel=0.01)


def test_two_coins() -> None:
    """pi: heads with p, then q; mu: p_b, then q_b. The reward is one for two heads."""
    p, q, p_b, q_b = 0.6, 0.3, 0.45, 0.7
    world = product_policies(coins(p, q), coins(p_b, q_b))
    reward = world.tokens.prod(1).to(torch.float64)[:, None]
    got = {name: float(world.gradient(RATIOS[name](world.log_ratio) * reward, world.mu)[0, 1]) for name in RATIOS}
    close(got["sequence"], p * (1 - p) * q)
    close(true_gradient(world, reward[:, 0])[0, 1], p * (1 - p) * q)
    close(got["cumulative"], p * (1 - p) * q_b)
    assert abs(got["cumulative"] - got["sequence"]) > 0.09
    # The shorter product is not the calmer one when the suffix that pays is rarer under pi (q < q_b): first row only.
    square = {name: 2 * (1 - p) ** 2 * p**2 / p_b * (q_b if name == "cumulative" else q**2 / q_b) for name in UNBIASED}
    first = torch.tensor([1.0, 0.0])
    for name in UNBIASED:
        close(world.variance(RATIOS[name](world.log_ratio) * reward * first), square[name] - 2 * got[name] ** 2)
    assert square["sequence"] - 2 * got["sequence"] ** 2 < square["cumulative"] - 2 * got["cumulative"] ** 2


def test_two_ways_to_the_true_gradient_of_a_terminal_reward_without_the_suffix_ratio(world: Policies) -> None:
    """pi's advantage with the prefix ratio held fixed, or mu's advantage with the gradient through every ratio."""
    reward = normal(len(world.tokens))
    target = true_gradient(world, reward)
    weights = RATIOS["cumulative"](world.log_ratio)
    close(world.gradient(weights * world.at(advantage_of(world, world.pi, reward)), world.mu), target)
    logits = world.pi.clone().requires_grad_()
    ratio = (world.logp(logits) - world.logp(world.mu)).cumsum(1).exp()
    baseline = (torch.softmax(world.mu, 1) * action_values(world, world.mu, reward)).sum(1)[world.rows]
    surrogate = world.prob(world.mu) @ (ratio * (reward[:, None] - baseline)).sum(1)
    close(surrogate, (world.prob(world.pi) - world.prob(world.mu)) @ reward)
    close(torch.autograd.grad(surrogate, logits)[0], target)
    assert differs(world.gradient(weights * world.at(advantage_of(world, world.mu, reward)), world.mu), target)


@pytest.mark.parametrize("two_values", [False, True])
def test_group_mean_scales_the_gradient_and_the_std_turns_it(two_values: bool) -> None:
    """Every group of three sequences, with the package's own advantages. Two values leave the std no room: a factor again."""
    world, size = random_policies(2, 3, 5), 3
    reward = normal(len(world.tokens))
    reward = (reward > 0).to(torch.float64) if two_values else reward
    groups = torch.cartesian_prod(*[torch.arange(len(world.tokens))] * size)
    others = world.prob(world.mu)[groups[:, 1:]].prod(1)

    def estimate(name: str, normalize_std: bool) -> Tensor:
        first = [group_advantages(group, normalize_std=normalize_std)[0] for group in reward[groups].tolist()]
        expected = torch.zeros_like(reward).index_add(0, groups[:, 0], others * torch.tensor(first, dtype=torch.float64))
        return world.gradient(RATIOS[name](world.log_ratio) * expected[:, None], world.mu)

    for name in (*UNBIASED, "token"):
        plain = world.gradient(RATIOS[name](world.log_ratio) * reward[:, None], world.mu)
        close(estimate(name, False), plain * (1 - 1 / size))
        turned = estimate(name, True)
        cosine = float((turned * plain).sum() / turned.norm() / plain.norm())
        assert cosine > 1 - 1e-12 if two_values else cosine < 1 - VISIBLE
    plain = world.gradient(RATIOS["geometric mean"](world.log_ratio) * reward[:, None], world.mu)
    assert differs(estimate("geometric mean", False), plain * (1 - 1 / size))


def test_dividing_by_a_length_that_the_suffix_decides_is_no_function_of_the_prefix() -> None:
    """Word 0 ends a sequence. Sums over tokens stay unbiased, means over tokens do not."""
    world = random_policies(3, 5, 6)
    mask = ((world.tokens == 0).cumsum(1) - (world.tokens == 0).to(torch.int64)) == 0
    at = world.at(normal(*world.pi.shape))
    inverse = 1 / mask.sum(1, keepdim=True).to(torch.float64)
    for objective, unbiased_mean in ((OBJECTIVES["cumulative"], False), (OBJECTIVES["sequence"], True)):
        summed = loss_weights(objective, world, at, mask, aggregation="sequence-sum")
        averaged = loss_weights(objective, world, at, mask, aggregation="sequence-mean")
        close(world.gradient(summed, world.mu), world.gradient(at * mask, world.pi))
        target = world.gradient(at * mask * inverse, world.pi)
        if unbiased_mean:
            close(world.gradient(averaged, world.mu), target)
        else:
            assert differs(world.gradient(averaged, world.mu), target)


# ---- what `policy_loss` returns


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objectives_are_these_estimators(name: str) -> None:
    """One call per sequence, weighted by mu's probability, differentiated down to pi's logits."""
    world = random_policies(3, 3, 9)
    at, reward = world.at(normal(*world.pi.shape)), normal(len(world.tokens), 1, seed=11).expand(-1, world.horizon)
    for signal, unbiased in ((at, UNBIASED), (reward, ("sequence",))):
        logits = world.pi.clone().requires_grad_()
        logp, old_logp = world.logp(logits), world.logp(world.mu)
        losses = [
            policy_loss(
                OBJECTIVES[name],
                logp=logp[n],
                old_logp=old_logp[n],
                advantages=signal[n],
                mask=torch.ones(world.horizon, dtype=torch.bool),
                cu_seqlens=torch.tensor([0, world.horizon]),
                aggregation="sequence-sum",
                normalizer=1.0,
                scan=LocalScan(exact=False),
            ).loss
            for n in range(len(world.tokens))
        ]
        got = -torch.autograd.grad(world.prob(world.mu) @ torch.stack(losses), logits)[0]
        close(got, world.gradient(RATIOS[name](world.log_ratio) * signal, world.mu))
        close(got, world.gradient(loss_weights(OBJECTIVES[name], world, signal), world.mu))
        assert differs(got, world.gradient(signal, world.pi)) is (name not in unbiased)


def test_the_cap_on_a_ratio_loses_what_mu_hardly_ever_writes() -> None:
    world = random_policies(3, 3, 9)
    rare = torch.zeros_like(world.mu)
    rare[0, 0] = -15
    world = dataclasses.replace(world, mu=world.mu + rare)
    at = world.at(normal(*world.pi.shape))
    target = world.gradient(at, world.pi)
    close(world.gradient(RATIOS["cumulative"](world.log_ratio) * at, world.mu), target)
    assert differs(world.gradient(loss_weights(OBJECTIVES["cumulative"], world, at), world.mu), target)


def test_fixed_point_sums_cost_no_more_than_their_resolution() -> None:
    world = random_policies(3, 6, 3)
    at = world.at(normal(*world.pi.shape))
    exact = loss_weights(OBJECTIVES["cumulative"], world, at, scan=None)  # the default
    plain = loss_weights(OBJECTIVES["cumulative"], world, at)
    half_units = world.horizon * 2.0**-39  # each term is rounded to a multiple of 2**-38
    assert 0 < float((exact / plain - 1).abs().max()) < half_units * (1 + VISIBLE)


def test_a_restart_leaves_what_comes_before_it_to_mu() -> None:
    world, start = random_policies(3, 5, 10), 2
    advantages = normal(*world.pi.shape)
    restarts = torch.zeros_like(world.tokens, dtype=torch.bool)
    restarts[:, start] = True
    got = world.gradient(
        loss_weights(OBJECTIVES["cumulative"], world, world.at(advantages), restarts=restarts.flatten()), world.mu
    )
    later = depth(world) >= start
    spliced = torch.where(later[:, None], world.pi, world.mu)
    visits = torch.where(later, occupancy(world, spliced), occupancy(world, world.pi))
    close(got, tree_gradient(world, visits, advantages))
    assert differs(got, tree_gradient(world, occupancy(world, world.pi), advantages))


@pytest.mark.parametrize(("level", "unbiased"), [("prefix", True), ("sequence", True), ("token", False), ("geometric", False)])
def test_a_correction_for_the_rollout_policy_composes_if_it_covers_the_prefix(level: str, unbiased: bool) -> None:
    """mu sampled, `old` is the anchor of the ratio: their product is pi/mu where both reach back to the first token."""
    world = random_policies(3, 4, 12)
    old = world.mu + 0.3 * normal(*world.mu.shape, seed=13)
    correction = {"type": "truncate", "level": level, "low": 0.0, "high": 1e9}
    at = world.at(normal(*world.pi.shape))
    got = world.gradient(loss_weights(OBJECTIVES["cumulative"], world, at, old=old, correction=correction), world.mu)
    target = world.gradient(at, world.pi)
    if unbiased:
        close(got, target)
    else:
        assert differs(got, target)
    reward = normal(len(world.tokens), 1, seed=11)
    got = world.gradient(loss_weights(OBJECTIVES["cumulative"], world, reward, old=old, correction=correction), world.mu)
    suffix = {"prefix": world.mu, "sequence": old}.get(level)
    if suffix is not None:  # whose tokens follow decides whose value a terminal reward shows
        close(got, tree_gradient(world, occupancy(world, world.pi), action_values(world, suffix, reward[:, 0])))
    assert differs(got, true_gradient(world, reward[:, 0]))
