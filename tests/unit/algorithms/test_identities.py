"""What the objectives must have in common: limits in which one is another, and changes of a batch that change nothing."""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace

import pytest
import torch

from tests.support.oracles import Row
from tests.support.oracles_cases import packed, run_policy_loss

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
NO_CLIP = {"clip_low": 60.0, "clip_high": 60.0, "dual_clip": None}
PPO_TYPE = [
    {"type": "ctpo"},
    {"type": "ctpo", "ratio": "geomean", "power": -0.5},
    {"type": "grpo"},
    {"type": "gspo"},
    {"type": "sequence"},
    {"type": "gmpo"},
    {"type": "minpro", "form": "ppo"},
    {"type": "cppo"},
    {"type": "trm"},
    {"type": "drpo"},
    {"type": "kpop"},
    {"type": "ctpo", "band": "entropy"},
]
# at ratio 1 these differ from -A in value, not in gradient
GRADIENT_ONLY = [{"type": "sapo"}, {"type": "reinforce"}, {"type": "cispo"}, {"type": "minpro"}, {"type": "dppo"}]


def make_row(logp: list[float], drifts: list[float], advantage: float, mask: list[bool] | None = None) -> Row:
    """Old and rollout policy are the same one."""
    old = [x - d for x, d in zip(logp, drifts, strict=True)]
    tokens = len(logp)
    tops = [[x, math.log(0.6 * (1 - math.exp(x)))] for x in logp], [[x, math.log(0.5 * (1 - math.exp(x)))] for x in old]
    return Row(logp, old, list(old), [advantage] * tokens, mask or [True] * tokens, [False] * tokens, *tops)


def draw_rows(lengths: list[int], *, scale: float, seed: int = 0) -> list[Row]:
    """Of both signs in turn; every token is a policy token."""
    rng = random.Random(seed)
    rows = []
    for i, length in enumerate(lengths):
        drifts = [rng.gauss(0, scale) for _ in range(length)]
        logp = [min(0.0, d) - rng.uniform(0.05, 2.0) for d in drifts]
        rows.append(make_row(logp, drifts, (-1) ** i * rng.uniform(0.5, 2.0)))
    return rows


def with_holes(row: Row, rng: random.Random) -> Row:
    """The row with one to three masked tokens before, between and behind its own."""
    hole = {"logp": math.nan, "old_logp": -math.inf, "rollout_logp": 5.0, "advantage": 7.0, "mask": False, "restart": False}
    streams: dict[str, list] = {f.name: [] for f in fields(Row)}
    for t in range(len(row.mask) + 1):
        for _ in range(rng.randint(1, 3)):
            for name, stream in streams.items():
                stream.append(hole.get(name, [math.nan, math.inf]))
        if t < len(row.mask):
            for name, stream in streams.items():
                stream.append(getattr(row, name)[t])
    return Row(**streams)


def assert_equal_losses(first: dict, second: dict, rows: list[Row], **settings: object) -> None:
    for got, want in zip(run_policy_loss(first, rows, **settings), run_policy_loss(second, rows, **settings), strict=True):
        torch.testing.assert_close(got, want, **TIGHT)


@pytest.mark.parametrize("scale", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("ratio", ["cumulative", "geomean"])
def test_with_one_policy_token_ctpo_sequence_and_grpo_are_one(scale: float, ratio: str) -> None:
    rng = random.Random(1)
    rows = [with_holes(row, rng) for row in draw_rows([1] * 40, scale=scale)]
    low, high, dual = 0.2, 0.3, 0.7
    window = {"clip_low": 1 - math.exp(-low), "clip_high": math.exp(high) - 1}
    ctpo = {"type": "ctpo", "ratio": ratio, "clip_low": low, "clip_high": high}
    assert_equal_losses({**ctpo, "dual_clip": None}, {"type": "sequence", **window}, rows)
    assert_equal_losses({**ctpo, "dual_clip": None}, {"type": "grpo", **window, "dual_clip": None}, rows)
    assert_equal_losses({**ctpo, "dual_clip": dual}, {"type": "grpo", **window, "dual_clip": math.exp(dual)}, rows)


@pytest.mark.parametrize("objective", PPO_TYPE + GRADIENT_ONLY, ids=lambda o: "-".join(map(str, o.values())))
def test_at_ratio_one_the_gradient_is_minus_the_advantage(objective: dict) -> None:
    rows = draw_rows([4, 1, 7], scale=0.0)
    advantages = packed(rows, "advantage")
    _, token_loss, gradient = run_policy_loss(objective, rows, aggregation="token-mean")
    torch.testing.assert_close(gradient, -advantages / 12, **TIGHT)
    if objective in PPO_TYPE:
        torch.testing.assert_close(token_loss, -advantages, **TIGHT)


@pytest.mark.parametrize(
    ("prefix", "whole"),
    [
        ({"type": "ctpo", **NO_CLIP}, {"type": "sequence", "clip_high": 1e9}),
        ({"type": "ctpo", "ratio": "geomean", **NO_CLIP}, {"type": "gspo", "clip_high": 1e9}),
    ],
    ids=["cumulative", "geomean"],
)
def test_the_last_token_has_the_ratio_of_the_whole_sequence(prefix: dict, whole: dict) -> None:
    lengths = [5, 1, 9]
    rows = [replace(row, advantage=[1.5] * length) for row, length in zip(draw_rows(lengths, scale=0.4), lengths, strict=True)]
    of_prefix, of_whole = (run_policy_loss(objective, rows)[1:] for objective in (prefix, whole))
    last = torch.tensor(lengths).cumsum(0) - 1
    for got, want in zip(of_prefix, of_whole, strict=True):
        torch.testing.assert_close(got[last], want[last], **TIGHT)
    assert (of_prefix[0] - of_whole[0]).abs().max() > 0.01  # the others have not


@pytest.mark.parametrize(
    "objective",
    [
        *PPO_TYPE,
        *GRADIENT_ONLY,
        {"type": "cppo", "adaptive_budget": True, "budget": 0.002},
        {"type": "cppo", "divergence": "topk_tv"},
        {"type": "trm", "divergence": "topk_kl", "mean_divergence": 0.02},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
@pytest.mark.parametrize("exact", [True, False])
def test_masked_tokens_anywhere_change_nothing(objective: dict, exact: bool) -> None:
    rng = random.Random(2)
    rows = draw_rows([5, 1, 8, 3], scale=0.2) + draw_rows([4, 4], scale=0.01)
    padded = [with_holes(row, rng) for row in rows]
    policy = packed(padded, "mask")
    for aggregation in ("sequence-mean", "token-mean", "balanced"):
        settings = {"aggregation": aggregation, "groups": [1, 1, 2, 2, 1, 1] if aggregation == "balanced" else None}
        want = run_policy_loss(objective, rows, exact=exact, **settings)
        got = run_policy_loss(objective, padded, exact=exact, **settings)
        torch.testing.assert_close(got[0], want[0], **TIGHT)
        for of_padded, of_rows in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(of_padded[policy], of_rows, **TIGHT)
            assert not of_padded[~policy].any()
        assert want[2].any()


def test_minpro_with_a_minimum_of_one_is_grpo() -> None:
    clip = {"clip_low": 0.2, "clip_high": 0.28}
    minpro, grpo = {"type": "minpro", "form": "ppo", **clip}, {"type": "grpo", **clip, "dual_clip": None}
    first_tokens = draw_rows([1] * 30, scale=0.3)
    # a first drift of 0 and none below it keep the minimum at a ratio of 1
    rising = [make_row([-1.0, -0.5, -0.7, -0.2], [0.0, 0.1, 0.5, 0.02], advantage) for advantage in (1.0, -1.0)]
    assert_equal_losses(minpro, grpo, first_tokens + rising)
    falling = [make_row([-1.0, -0.5], [-0.1, 0.05], 1.0)]
    assert run_policy_loss(minpro, falling)[0] != run_policy_loss(grpo, falling)[0]


@pytest.mark.parametrize("objective", PPO_TYPE, ids=lambda o: "-".join(map(str, o.values())))
def test_with_equal_lengths_the_means_agree(objective: dict) -> None:
    rows = draw_rows([6] * 8, scale=0.02)
    groups = [0, 0, 0, 5, 5, 5, 0, 5]
    token_mean = run_policy_loss(objective, rows, aggregation="token-mean")
    for other in ({"aggregation": "sequence-mean"}, {"aggregation": "balanced", "groups": groups}):
        for got, want in zip(run_policy_loss(objective, rows, **other), token_mean, strict=True):
            torch.testing.assert_close(got, want, **TIGHT)
    uneven = [*rows, *draw_rows([2, 3], scale=0.02)]
    balanced = run_policy_loss(objective, uneven, aggregation="balanced", groups=[*groups, 0, 0])[0]
    assert abs(balanced - run_policy_loss(objective, uneven, aggregation="token-mean")[0]) > 1e-4


def test_cppo_with_a_huge_budget_is_importance_weighted_policy_gradient() -> None:
    rows = draw_rows([7, 12, 3], scale=0.5)
    advantages, ratios = packed(rows, "advantage"), (packed(rows, "logp") - packed(rows, "rollout_logp")).exp()
    objective = {"type": "cppo", "delta": 1e6, "budget": 1e6}
    loss, token_loss, gradient = run_policy_loss(objective, rows, aggregation="token-mean")
    torch.testing.assert_close(token_loss, -advantages * ratios, **TIGHT)
    torch.testing.assert_close(gradient, -advantages * ratios / 22, **TIGHT)
    torch.testing.assert_close(loss, (-advantages * ratios).mean(), **TIGHT)
    assert (run_policy_loss({"type": "cppo"}, rows)[1] == 0).any()


@pytest.mark.parametrize("divergence", ["binary_tv", "binary_kl", "topk_tv", "topk_kl"])
def test_cppo_with_equal_weights_and_a_huge_budget_has_the_mask_of_dppo(divergence: str) -> None:
    rows = draw_rows([7, 12, 3, 9], scale=0.5)
    both = {"divergence": divergence, "delta": 0.1}
    cppo = run_policy_loss({"type": "cppo", **both, "weight_min": 1.0, "budget": 1e6}, rows)[2]
    dppo = run_policy_loss({"type": "dppo", **both, "ratio_cap": None}, rows)[2]
    torch.testing.assert_close(cppo, dppo, **TIGHT)
    assert (cppo == 0).any()
    assert (cppo != 0).any()


@pytest.mark.parametrize("objective", [{"type": "cppo"}, {"type": "dppo"}], ids=["cppo", "dppo"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_sampled_token_that_has_not_moved_is_kept_whatever_the_others_did(objective: dict, advantage: float) -> None:
    moved = make_row([-2.0, -2.0], [0.0, 0.0], advantage)
    moved.top_rollout[:] = [[-2.0, -0.2], [-2.0, -5.0]]
    assert (run_policy_loss({**objective, "divergence": "topk_tv"}, [moved])[2] == -advantage / 2).all()


def test_trm_is_two_sided() -> None:
    """Neither the sign of the advantage nor the direction of the drift matters to it; both do to DPPO."""
    trm = {"type": "trm", "divergence": "k2", "mean_divergence": 0.01}
    dppo = {"type": "dppo", "delta": 0.05}
    for drift, kept in ((0.1, True), (0.2, False)):  # k2: 0.005, 0.02
        rows = [make_row([-0.8] * 4, [sign * drift] * 4, a) for sign in (1, -1) for a in (1.0, -1.0)]
        nonzero = run_policy_loss(trm, rows)[1].reshape(4, 4) != 0
        assert nonzero.all() if kept else not nonzero.any()
    away = run_policy_loss(dppo, rows)[1].reshape(4, 4) == 0  # 0.45 against 0.37 and 0.55
    assert away.all(dim=1).tolist() == [True, False, False, True]
    assert away.any(dim=1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("level", ["token", "prefix", "sequence", "geometric"])
def test_a_correction_between_equal_policies_is_none(level: str) -> None:
    rows = draw_rows([5, 2, 8], scale=0.1)
    plain = run_policy_loss({"type": "ctpo"}, rows)
    for kind in ("truncate", "mask"):
        corrected = run_policy_loss(
            {"type": "ctpo"}, rows, correction={"type": kind, "level": level, "low": 0.999, "high": 1.001}
        )
        for got, want in zip(corrected, plain, strict=True):
            torch.testing.assert_close(got, want, **TIGHT)


@pytest.mark.parametrize(("bound", "advantage"), [(0.5, 1.0), (-0.25, -1.0), (1.0, -1.0)], ids=["high", "low", "dual"])
@pytest.mark.parametrize("power", [-0.5, 0.0, 0.5])
def test_the_gradient_of_ctpo_ends_at_the_bounds(bound: float, advantage: float, power: float) -> None:
    objective = {"type": "ctpo", "clip_low": 0.25, "clip_high": 0.5, "dual_clip": 1.0, "power": power}
    for step, inside in ((1 - 1e-6, True), (1 + 1e-6, False)):
        total = bound * 4**power * step  # at the fourth token, all of it from the first
        row = make_row([-1.0] * 4, [total, 0.0, 0.0, 0.0], advantage)
        slope = run_policy_loss(objective, [row], aggregation="sequence-sum")[2][3].item()
        assert slope == pytest.approx(-advantage * math.exp(total) if inside else 0.0, rel=1e-12)
