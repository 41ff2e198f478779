"""Rewards become advantages: examples by hand, slow readings of the definitions, and what must hold for any rewards."""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ctpo_megatron.algorithms.advantages import compute_advantages, group_advantages
from ctpo_megatron.algorithms.advantages.group import rloo_advantages
from ctpo_megatron.algorithms.advantages.reinforce import outcome_returns, whiten
from ctpo_megatron.algorithms.advantages.tempo import tempo_advantages, value_steps
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.advantages import (
    GroupAdvantage,
    LengthShaping,
    OverlongShaping,
    ReinforceAdvantage,
    RlooAdvantage,
    ShapingConfig,
    TempoAdvantage,
)
from ctpo_megatron.loop.train import make_batches
from ctpo_megatron.types import TrajectoryGroup
from tests.support.trajectories import branched, group_of, trajectory

EVERY_KIND = [
    GroupAdvantage(),
    GroupAdvantage(normalize_std=False),
    RlooAdvantage(),
    ReinforceAdvantage(),
    ReinforceAdvantage(gamma=0.9, baseline="group"),
    TempoAdvantage(),
    TempoAdvantage(normalize_std=False),
]


def flat(nested) -> list[float]:
    """All numbers in lists of lists."""
    return [number for each in nested for number in flat(each)] if isinstance(nested, list) else [nested]


REWARDS = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=2, max_size=16)
# tokens 0 to 2 and turns of them, drawn as text: one choice for each response, not one for each token
TOKENS = st.text("012", max_size=5).map(lambda text: [int(token) for token in text])
TURNS = st.text("012|", max_size=14).map(lambda text: [[int(token) for token in turn] for turn in text.split("|")[:3]])
TRAJECTORIES = st.builds(lambda reward, turns: trajectory(reward, *turns), st.sampled_from([0.0, 0.5, 1.0]), TURNS)
GROUPS = st.lists(st.lists(TRAJECTORIES, min_size=1, max_size=6).map(lambda members: group_of(*members)), min_size=1, max_size=4)


# groups


def test_group_advantages_by_hand():
    assert group_advantages([1, 0, 0, 1], normalize_std=False) == [0.5, -0.5, -0.5, 0.5]
    # mean 2, deviations -1, 0, 1, unbiased variance (1 + 0 + 1) / 2 = 1
    assert group_advantages([1, 2, 3]) == pytest.approx([-1 / (1 + 1e-6), 0, 1 / (1 + 1e-6)], rel=1e-14)
    assert group_advantages([1, 1, 1]) == [0, 0, 0]


def test_rloo_by_hand():
    # the others' means: 0, 0.5, 0.5
    assert rloo_advantages([1, 0, 0]) == pytest.approx([1, -0.5, -0.5], rel=1e-14)


@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
def test_in_a_group_of_one_nothing_is_taken_off(kind):
    # the second group keeps whitening from dividing by zero: values 0.3, 0.3, -0.3, -0.3, of mean 0 and deviation 0.3
    groups = [group_of(trajectory(0.3, [1, 2])), group_of(trajectory(-0.3, [1, 2]))]
    if isinstance(kind, ReinforceAdvantage):
        kind = ReinforceAdvantage(baseline=kind.baseline)
        expected = 0.3 / (0.3 + 1e-6)
    else:
        expected = 0.3
    assert flat(compute_advantages(groups, kind)) == pytest.approx([expected, expected, -expected, -expected], rel=1e-14)


@given(REWARDS)
def test_group_advantages_sum_to_zero_and_are_scaled(rewards):
    centred, scaled = group_advantages(rewards, normalize_std=False), group_advantages(rewards)
    assert math.fsum(centred) == pytest.approx(0, abs=1e-13)
    deviation = statistics.stdev(rewards)
    assert [value * (deviation + 1e-6) for value in scaled] == pytest.approx(centred, abs=1e-13)


@given(REWARDS)
def test_rloo_takes_off_the_mean_of_the_others(rewards):
    slow = [reward - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, reward in enumerate(rewards)]
    assert rloo_advantages(rewards) == pytest.approx(slow, abs=1e-13)


def test_each_type_of_group_advantage_reaches_the_tokens():
    groups = [group_of(*(trajectory(reward, [1, 2]) for reward in (1.0, 0.0, 0.0)))]
    assert flat(compute_advantages(groups, RlooAdvantage())) == pytest.approx([1, 1] + [-0.5] * 4, rel=1e-14)
    centred = [2 / 3] * 2 + [-1 / 3] * 4
    assert flat(compute_advantages(groups, GroupAdvantage(normalize_std=False))) == pytest.approx(centred, rel=1e-14)
    # unbiased variance (4/9 + 1/9 + 1/9) / 2
    scaled = [value / (math.sqrt(1 / 3) + 1e-6) for value in centred]
    assert flat(compute_advantages(groups, GroupAdvantage())) == pytest.approx(scaled, rel=1e-14)


# REINFORCE++


def slow_returns(rewards: list[float], mask: list[bool], gamma: float) -> list[float]:
    """From the last token backwards; a masked token gets 0 and hands on what came after it, undiscounted."""
    carry, returns = 0.0, [0.0] * len(rewards)
    for t in reversed(range(len(rewards))):
        if mask[t]:
            carry = rewards[t] + gamma * carry
            returns[t] = carry
    return returns


def slow_reinforce(groups: list[TrajectoryGroup], gamma: float, baseline: str) -> list[float]:
    """All advantages of the batch in one row, over full streams with masks."""
    returns = []
    for group in groups:
        for each in group.trajectories:
            mask = [turn.role == "assistant" for turn in each.turns for _ in turn.token_ids]
            alone = len(group.trajectories) == 1 or baseline == "none"
            off = 0.0 if alone else statistics.fmean(t.reward for t in group.trajectories)
            last = max((t for t, wrote in enumerate(mask) if wrote), default=-1)
            rewards = [each.reward - off if t == last else 0.0 for t in range(len(mask))]
            returns += [g for g, wrote in zip(slow_returns(rewards, mask, gamma), mask, strict=True) if wrote]
    if not returns:
        return []
    mean, deviation = statistics.fmean(returns), statistics.pstdev(returns)
    return [(value - mean) / (deviation + 1e-6) for value in returns]


def test_reinforce_by_hand():
    # returns with gamma 0.5: 0.5 (a tool token in between does not discount), 1 | 0, 0; mean 3/8
    # squared deviations: 1/64 + 25/64 + 9/64 + 9/64 = 44/64, variance 11/64
    groups = [group_of(trajectory(1.0, [1], [7, 7, 7], [2])), group_of(trajectory(0.0, [1, 2]))]
    deviation = math.sqrt(11 / 64) + 1e-6
    found = compute_advantages(groups, ReinforceAdvantage(gamma=0.5))
    assert [len(each) for group in found for each in group] == [2, 2]
    assert flat(found) == pytest.approx([0.125 / deviation, 0.625 / deviation, -0.375 / deviation, -0.375 / deviation], rel=1e-14)


def test_returns_at_the_ends_of_gamma():
    assert outcome_returns(3.0, 4, 1.0).tolist() == [3.0, 3.0, 3.0, 3.0]
    assert outcome_returns(3.0, 4, 0.0).tolist() == [0.0, 0.0, 0.0, 3.0]
    assert outcome_returns(3.0, 0, 0.9).tolist() == []


@given(GROUPS, st.sampled_from([1.0, 0.9, 0.0]), st.sampled_from(["none", "group"]))
def test_reinforce_is_the_slow_reading(groups, gamma, baseline):
    found = compute_advantages(groups, ReinforceAdvantage(gamma=gamma, baseline=baseline))
    assert flat(found) == pytest.approx(slow_reinforce(groups, gamma, baseline), abs=1e-9)


@given(st.lists(st.lists(st.floats(-10, 10), max_size=6), max_size=6))
def test_whitened_values_have_mean_0_and_variance_1(sequences):
    found = whiten(sequences)
    assert [len(each) for each in found] == [len(each) for each in sequences]
    values = [value for each in sequences for value in each]
    assume(values and statistics.pstdev(values) > 1e-2)
    whitened = [float(value) for each in found for value in each]
    assert statistics.fmean(whitened) == pytest.approx(0, abs=1e-12)
    deviation = statistics.pstdev(values)
    assert statistics.pvariance(whitened) == pytest.approx((deviation / (deviation + 1e-6)) ** 2, rel=1e-12)
    assert statistics.pvariance(whitened) == pytest.approx(1, abs=2.1e-4)  # 2 * 1e-6 / 1e-2, the smallest deviation here


# TEMPO


def slow_tempo(responses: list[list[int]], rewards: list[float], normalize_std: bool) -> list[list[float]]:
    """V of every prefix by looking at every response."""

    def value(prefix: list[int]) -> float:
        return statistics.fmean(r for o, r in zip(responses, rewards, strict=True) if o[: len(prefix)] == prefix)

    alone = len(rewards) == 1
    mean = 0.0 if alone else statistics.fmean(rewards)
    scale = 1.0 if alone or not normalize_std else statistics.stdev(rewards) + 1e-6
    return [
        [(reward - mean + value(o[: t + 1]) - value(o[:t])) / scale for t in range(len(o))]
        for o, reward in zip(responses, rewards, strict=True)
    ]


# 1 ─ 2 ─ 3   reward 1      mean 1/2; V(1) = 2/3, V(1 2) = 1/2, a whole response has its own reward
#   │   └ 4   reward 0
#   └ 5       reward 1
# 6           reward 0
TREE = [[1, 2, 3], [1, 2, 4], [1, 5], [6]]
TREE_REWARDS = [1.0, 0.0, 1.0, 0.0]


def test_tempo_by_hand():
    found = tempo_advantages(TREE, TREE_REWARDS, normalize_std=False)
    expected = [
        [1 / 2 + 1 / 6, 1 / 2 - 1 / 6, 1 / 2 + 1 / 2],
        [-1 / 2 + 1 / 6, -1 / 2 - 1 / 6, -1 / 2 - 1 / 2],
        [1 / 2 + 1 / 6, 1 / 2 + 1 / 3],
        [-1 / 2 - 1 / 2],
    ]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-14)
    # deviations of 1/2 each: unbiased variance 4 * (1/4) / 3
    scaled = tempo_advantages(TREE, TREE_REWARDS)
    assert flat(scaled) == pytest.approx([value / (math.sqrt(1 / 3) + 1e-6) for value in flat(expected)], rel=1e-14)


def test_tool_tokens_are_on_the_path_but_carry_nothing():
    # the tree above, where 2 is what a tool said after 1: the responses still part after it, and its own change is dropped
    group = group_of(
        trajectory(1.0, [1], [2], [3]), trajectory(0.0, [1], [2], [4]), trajectory(1.0, [1, 5]), trajectory(0.0, [6])
    )
    (found,) = compute_advantages([group], TempoAdvantage(normalize_std=False))
    expected = [[2 / 3, 1], [-1 / 3, -1], [2 / 3, 5 / 6], [-1]]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-14)


@given(st.lists(st.tuples(TOKENS, st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=8), st.booleans())
def test_tempo_is_the_slow_reading(members, normalize_std):
    responses, rewards = [tokens for tokens, _ in members], [reward for _, reward in members]
    found = tempo_advantages(responses, rewards, normalize_std=normalize_std)
    for one, other in zip(found, slow_tempo(responses, rewards, normalize_std), strict=True):
        assert one == pytest.approx(other, abs=1e-9)


@given(st.lists(st.tuples(TOKENS, st.floats(-1, 1)), min_size=2, max_size=8))
def test_changes_of_value_telescope(members):
    # an end of its own makes each response a leaf, whose value is its reward
    responses = [[*tokens, 100 + number] for number, (tokens, _) in enumerate(members)]
    rewards = [reward for _, reward in members]
    mean = statistics.fmean(rewards)
    for steps, reward in zip(value_steps(responses, rewards), rewards, strict=True):
        assert math.fsum(steps.values()) == pytest.approx(reward - mean, abs=1e-12)


def test_responses_that_share_only_the_prompt_differ_from_the_group_advantage_at_their_first_token():
    responses, rewards = [[1, 2, 2], [2, 2, 2], [3, 2]], [1.0, 0.0, 0.0]
    group = group_advantages(rewards)
    for values, advantage in zip(tempo_advantages(responses, rewards), group, strict=True):
        assert values == pytest.approx([2 * advantage] + [advantage] * (len(values) - 1), rel=1e-12)


def test_a_tree_deeper_than_python_recurses():
    size = 1500  # each response leaves the common path one token later than the one before
    responses, rewards = [[1] * number + [2] for number in range(size)], [float(number % 2) for number in range(size)]
    steps = value_steps(responses, rewards)
    assert len(steps[-1]) == size - 1  # the last node has two responses, and both leave it at the same depth
    assert math.fsum(steps[-1].values()) == pytest.approx(1 - 0.5, abs=1e-9)


# the whole way


@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
@given(GROUPS)
def test_one_value_per_token_of_the_policy_and_groups_stay_as_they_are(kind, groups):
    before = copy.deepcopy(groups)
    shaping = ShapingConfig(length=LengthShaping(), overlong=OverlongShaping(max_tokens=6, buffer=6))
    found = compute_advantages(groups, kind, shaping)
    assert groups == before
    assert [[len(each) for each in group] for group in found] == [[t.sampled_length for t in g.trajectories] for g in groups]
    assert all(type(value) is float and math.isfinite(value) for value in flat(found))


@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
@given(GROUPS, st.randoms(use_true_random=False))
def test_order_does_not_matter(kind, groups, random):
    found = compute_advantages(groups, kind)
    order = [random.sample(range(len(group.trajectories)), len(group.trajectories)) for group in groups]
    across = random.sample(range(len(groups)), len(groups))
    shuffled = [group_of(*(groups[g].trajectories[t] for t in order[g])) for g in across]
    again = compute_advantages(shuffled, kind)
    expected = [found[g][t] for g in across for t in order[g]]
    for one, other in zip([each for group in again for each in group], expected, strict=True):
        assert one == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
@given(GROUPS)
def test_equal_responses_with_equal_rewards_get_equal_advantages(kind, groups):
    for group in groups:
        group.trajectories.append(copy.deepcopy(group.trajectories[0]))
    for group in compute_advantages(groups, kind):
        assert group[0] == group[-1]


def test_advantages_come_from_shaped_rewards():
    # both right; the longer one, 4 tokens of 4, loses 1: rewards 1 and 0
    group = group_of(trajectory(1.0, [1, 2]), trajectory(1.0, [1, 2, 3, 4]))
    shaping = ShapingConfig(overlong=OverlongShaping(max_tokens=4, buffer=2))
    assert compute_advantages([group], GroupAdvantage(normalize_std=False), shaping) == [[[0.5] * 2, [-0.5] * 4]]
    assert [t.reward for t in group.trajectories] == [1.0, 1.0]


def run_config(algorithm: dict, **train: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "run_dir": "r",
            "model": {"path": "m"},
            "data": {"train": "d"},
            "train": {"prompts_per_step": 2, "optimizer_steps": 1, **train},
            "algorithm": algorithm,
            "cluster": {"device": "cpu"},
        }
    )


def test_token_level_advantages_reach_the_micro_batches():
    group = group_of(
        trajectory(1.0, [1], [2], [3]), trajectory(0.0, [1], [2], [4]), trajectory(1.0, [1, 5]), trajectory(0.0, [6])
    )
    config = run_config({"advantage": {"type": "tempo", "normalize_std": False}})
    (batch,) = make_batches([group, group], config)
    ((micro,),) = batch.micro_batches
    once = [2 / 3, 0, 1, -1 / 3, 0, -1, 2 / 3, 5 / 6, -1]  # zeros: tool tokens; one prompt token is no label
    assert micro.tokens.advantages.tolist() == pytest.approx(once * 2, rel=1e-6)
    assert micro.tokens.mask.tolist() == [value != 0 for value in once * 2]


def test_sequences_are_numbered_over_the_rollout_batch():
    groups = [group_of(trajectory(1.0, [1]), trajectory(0.0, [2])), group_of(trajectory(1.0, [3]), trajectory(0.0, [4]))]
    batches = make_batches(groups, run_config({}, optimizer_steps=2))
    found = [micro.sequences.ids.tolist() for batch in batches for rank in batch.micro_batches for micro in rank]
    assert found == [[0, 1], [2, 3]]


def test_a_run_that_shares_prompts_reads_each_once():
    groups = [group_of(*(replace(trajectory(reward, [1, 2]), prompt_ids=[9] * 5) for reward in (1.0, 0.0))) for _ in range(2)]
    for share, positions in ((None, 2 * 2 * 6), (4, 2 * (4 + 2 * 2)), (5, 2 * 2 * 6)):
        ((micro,),) = make_batches(groups, run_config({}, share_prompts=share))[0].micro_batches
        assert micro.positions == positions


def test_whitening_is_over_the_rollout_batch_not_over_an_optimizer_step():
    # within each optimizer step all returns are equal, and would become 0
    groups = [group_of(trajectory(1.0, [1, 2]), trajectory(1.0, [1])), group_of(trajectory(0.0, [1, 2, 3]))]
    batches = make_batches(groups, run_config({"advantage": {"type": "reinforce++"}}, optimizer_steps=2))
    found = [micro.tokens.advantages.tolist() for batch in batches for rank in batch.micro_batches for micro in rank]
    assert found == [pytest.approx([1, 1, 1], abs=1e-5), pytest.approx([-1, -1, -1], abs=1e-5)]


BRANCHED = [
    group_of(branched(1.0, ([9, 1], [[3], [4], [5, 6]]), ([9], [[7]])), trajectory(0.0, [1, 3])),
    group_of(trajectory(1.0, [1]), branched(0.5, ([9], [[3, 3]]))),
]


@pytest.mark.parametrize("kind", [GroupAdvantage(), RlooAdvantage(), ReinforceAdvantage(gamma=0.5), TempoAdvantage()])
def test_tokens_of_branches_come_last_and_earn_their_attempts_reward(kind):
    found = compute_advantages(BRANCHED, kind)
    assert [[len(each) for each in group] for group in found] == [[6, 2], [1, 4]]
    if isinstance(kind, GroupAdvantage | RlooAdvantage):
        assert all(len(set(each)) == 1 for group in found for each in group)
    if isinstance(kind, ReinforceAdvantage):  # each sample ends with the reward
        assert found[0][0][1] == found[0][0][4] == found[0][0][5] > found[0][0][0] == found[0][0][3] > found[0][0][2]
    if isinstance(kind, TempoAdvantage):
        assert found[0][0][2:] == [group_advantages([1.0, 0.0], normalize_std=kind.normalize_std)[0]] * 4
