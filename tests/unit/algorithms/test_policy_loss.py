"""CTPO against vectors produced by the authors' implementation, and against a slow scalar reading of the definition."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch

from ctpo_megatron.algorithms import (
    Channel,
    LocalScan,
    group_advantages,
    make_recipe,
    policy_loss,
    raise_if_nonfinite,
    recipe_loss,
)
from ctpo_megatron.errors import NonFiniteError

LP = [-0.10, -0.50, -1.20, -9.0, -3.0, -0.02, -2.00, -0.70, -0.30, -7.0]
OLP = [-0.12, -0.47, -1.35, -1.0, -5.0, -0.05, -1.80, -0.78, -0.10, -2.0]
MASK = [1, 1, 1, 0, 0, 1, 1, 1, 1, 0]


def run(rows, aggregation="sequence-mean", **objective):
    """rows: (logp, old_logp, mask, advantage) per sequence, packed."""
    logp = torch.tensor(list(chain.from_iterable(r[0] for r in rows)), dtype=torch.float64, requires_grad=True)
    old = torch.tensor(list(chain.from_iterable(r[1] for r in rows)), dtype=torch.float64)
    mask = torch.tensor(list(chain.from_iterable(r[2] for r in rows))).bool()
    adv = torch.cat([torch.full((len(r[0]),), r[3], dtype=torch.float64) for r in rows])
    cu = torch.tensor([0, *torch.tensor([len(r[0]) for r in rows]).cumsum(0).tolist()], dtype=torch.int32)
    out = policy_loss(
        {"type": "ctpo", **objective}, logp=logp, old_logp=old, advantages=adv, mask=mask, cu_seqlens=cu, aggregation=aggregation
    )
    out.loss.backward()
    return out, logp.grad


GOLDEN = [
    (
        1.5,
        -1.5189235450057041,
        [
            -0.21861457287286622,
            -0.21215353580339313,
            0,
            0,
            0,
            0,
            -0.20795261433182322,
            -0.22527237779486234,
            -0.18443742351965528,
            0,
        ],
    ),
    (
        -0.75,
        0.7675283758651056,
        [0.10930728643143811, 0.10607676790169657, 0, 0, 0, 0, 0.10397630716591161, 0.11263618889743117, 0, 0],
    ),
]


@pytest.mark.parametrize(("advantage", "loss", "grad"), GOLDEN)
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_golden_vectors(advantage, loss, grad, aggregation):
    out, got = run([(LP, OLP, MASK, advantage)], aggregation, dual_clip=0.05)
    assert out.loss.item() == pytest.approx(loss, abs=1e-10)
    assert got.tolist() == pytest.approx(grad, abs=1e-10)


@pytest.mark.parametrize(
    ("aggregation", "loss"),
    [("token-mean", -0.6918057478765353), ("sequence-mean", -0.38163657381271454), ("sequence-sum", -3.804931613320944)],
)
def test_golden_aggregations(aggregation, loss):
    lp1, olp1 = [x * 0.9 for x in LP], [x * 0.9 - 0.003 for x in LP]
    out, _ = run([(LP, OLP, MASK, 1.5), (lp1, olp1, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], -0.75)], aggregation)
    assert out.loss.item() == pytest.approx(loss, abs=1e-8)  # the reference divides by length + 1e-8


def test_golden_clip_counts():
    high = run([(LP, OLP, MASK, 1.5)])[0].stats
    low = run([(LP, OLP, MASK, -0.75)])[0].stats
    clips = ("clip_high", "clip_low", "clip_dual")
    assert [high.means[name] for name in clips] == [(2, 7), (0, 7), (0, 7)]
    assert [low.means[name] for name in clips] == [(0, 7), (1, 7), (2, 7)]
    assert high.sums["tokens"] == high.means["kl_old"].weight == 7
    assert high.means["kl_old"].total.item() / 7 == pytest.approx(0.021428571397959152, abs=1e-7)
    assert high.maxima["ratio_max"].item() == pytest.approx(1.1853048513203657, abs=1e-6)


def scalar_ctpo(lp, olp, mask, adv, *, ratio, lo, hi, dual, power):
    """Token losses and gradients of one sequence, read off the definition one token at a time."""
    total, n, losses, grads = 0.0, 0, [], []
    for x, y, m in zip(lp, olp, mask, strict=True):
        if not m:
            losses.append(0.0)
            grads.append(0.0)
            continue
        total += max(-20.0, min(20.0, x - y))
        n += 1
        raw = total if ratio == "cumulative" else total / n
        log_ratio = min(raw, 10.0)
        scale = n**power
        inside = -lo * scale <= log_ratio <= hi * scale
        plain = -adv * math.exp(log_ratio)
        clipped = -adv * math.exp(min(max(log_ratio, -lo * scale), hi * scale))
        loss, gradient = max(plain, clipped), plain if (plain > clipped or inside) and raw <= 10.0 else 0.0
        if adv < 0 and dual is not None and loss > -adv * math.exp(dual * scale):
            loss, gradient = -adv * math.exp(dual * scale), 0.0
        losses.append(loss)
        grads.append(gradient)
    return losses, grads


@pytest.mark.parametrize("ratio", ["cumulative", "geomean"])
@pytest.mark.parametrize(("dual", "power"), [(0.05, 0.5), (None, 0.5), (0.3, 0.0), (0.02, 1.0)])
def test_against_scalar_reading(ratio, dual, power):
    gen = torch.Generator().manual_seed(17)
    for drift in (0.01, 0.1, 3.0):
        rows = []
        for length in (1, 2, 7, 40):
            lp = (-torch.rand(length, generator=gen) * 3).tolist()
            olp = [x + drift * torch.randn(1, generator=gen).item() for x in lp]
            mask = (torch.rand(length, generator=gen) < 0.7).int().tolist()
            rows.append((lp, olp, mask, torch.randn(1, generator=gen).item()))
        out, grad = run(rows, "sequence-sum", ratio=ratio, clip_low=0.025, clip_high=0.06, dual_clip=dual, power=power)
        expected = [scalar_ctpo(*row, ratio=ratio, lo=0.025, hi=0.06, dual=dual, power=power) for row in rows]
        losses = list(chain.from_iterable(e[0] for e in expected))
        counted = sum(any(row[2]) for row in rows)
        assert out.token_loss.tolist() == pytest.approx(losses, abs=1e-8, rel=1e-9)
        assert grad.tolist() == pytest.approx([g / counted for e in expected for g in e[1]], abs=1e-8, rel=1e-9)


def test_masked_nan_changes_nothing():
    lp = [x if m else float("nan") for x, m in zip(LP, MASK, strict=True)]
    olp = [x if m else float("inf") for x, m in zip(OLP, MASK, strict=True)]
    clean, clean_grad = run([(LP, OLP, MASK, 1.5)])
    dirty, dirty_grad = run([(lp, olp, MASK, 1.5)])
    assert dirty.loss.item() == clean.loss.item()
    assert dirty_grad.tolist() == clean_grad.tolist()


def test_prefix_does_not_pass_gradient():
    """Only the last token carries an advantage, so only it may get a gradient."""
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    out = policy_loss(
        {"type": "ctpo"},
        logp=logp,
        old_logp=logp.detach() - 0.001,
        advantages=torch.tensor([0.0, 0.0, 1.0]),
        mask=torch.ones(3, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 3]),
    )
    out.loss.backward()
    assert logp.grad[:2].tolist() == [0.0, 0.0]
    assert logp.grad[2].item() == pytest.approx(-math.exp(0.003) / 3, abs=1e-10)


def test_packing_does_not_change_a_bit():
    row = (LP, OLP, MASK, 1.5)
    alone = run([row])[0].token_loss
    packed = run([([-0.3] * 5, [-0.9] * 5, [1] * 5, 1.0), row])[0].token_loss[5:]
    assert torch.equal(alone, packed)


def test_local_scan_is_exact_in_any_order():
    values = torch.randn(300, dtype=torch.float64).clamp(-20, 20)

    def scan(part: torch.Tensor):
        return LocalScan().run([Channel(part)], torch.tensor([0, part.numel()]))[0]

    whole, head, tail = scan(values), scan(values[:120]), scan(values[120:])
    assert torch.equal(whole.values[120:], tail.values + head.totals)
    assert (whole.values - values.cumsum(0)).abs().max() < 1e-9


def test_group_advantages():
    assert group_advantages([1, 0, 0, 1], normalize_std=False) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([1, 1, 1]) == [0, 0, 0]
    assert group_advantages([0.3]) == [0.3]
    assert group_advantages([1, 0]) == pytest.approx([0.5 / (math.sqrt(0.5) + 1e-6), -0.5 / (math.sqrt(0.5) + 1e-6)])


def test_unknown_objective_is_refused():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="ctpo"):
        policy_loss({"type": "cptpo"}, logp=one, old_logp=one, advantages=one, mask=one.bool(), cu_seqlens=torch.tensor([0, 1]))


def poisoned(place: int, value: float):
    """Two sequences of four tokens, the second of each masked; `value` stands at `place` of the log-probs."""
    logp = torch.full((8,), -1.0)
    logp[place] = value
    logp.requires_grad_()
    out = policy_loss(
        {"type": "ctpo"},
        logp=logp,
        old_logp=torch.full((8,), -1.1),
        advantages=torch.ones(8),
        mask=torch.tensor([True, False, True, True] * 2),
        cu_seqlens=torch.tensor([0, 4, 8]),
        sequence_ids=torch.tensor([7, 8]),
    )
    out.loss.backward()
    return out, logp.grad


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_prob_that_is_not_finite_is_named_unless_masked(value):
    clean, gradient = poisoned(1, -1.0)
    raise_if_nonfinite(clean.stats)
    masked, same = poisoned(1, value)
    raise_if_nonfinite(masked.stats)
    assert torch.equal(masked.loss, clean.loss)
    assert torch.equal(same, gradient)
    with pytest.raises(NonFiniteError, match=r"sequence 8, policy token 2 "):
        raise_if_nonfinite(poisoned(6, value)[0].stats)


def test_extremes_of_the_ratio_are_those_of_the_policys_tokens():
    small, _ = run([([-1.5, -1.0], [-1.0, -1.0], [1, 0], 1.0)])
    large, _ = run([([-0.5, -1.0], [-1.0, -1.0], [1, 0], 1.0)])
    assert small.stats.maxima["ratio_max"].item() == small.stats.minima["ratio_min"].item() == pytest.approx(math.exp(-0.5))
    assert large.stats.maxima["ratio_max"].item() == large.stats.minima["ratio_min"].item() == pytest.approx(math.exp(0.5))


def test_a_recipe_made_before_gives_the_same_loss():
    streams = {
        "logp": torch.tensor(LP, dtype=torch.float64),
        "old_logp": torch.tensor(OLP, dtype=torch.float64),
        "rollout_logp": torch.tensor(OLP, dtype=torch.float64) + 0.1,
        "advantages": torch.ones(len(LP), dtype=torch.float64),
        "mask": torch.tensor(MASK).bool(),
        "cu_seqlens": torch.tensor([0, 4, len(LP)]),
    }
    correction = {"type": "truncate", "level": "prefix"}
    recipe = make_recipe({"type": "ctpo", "power": 0.0}, "token-mean", correction, has_rollout=True)
    expected = policy_loss({"type": "ctpo", "power": 0.0}, aggregation="token-mean", correction=correction, **streams)
    found = recipe_loss(recipe, **streams)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.token_loss, expected.token_loss)
    with pytest.raises(ValueError, match="needs rollout_logp"):
        recipe_loss(recipe, **{**streams, "rollout_logp": None})
