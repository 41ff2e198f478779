"""GAE and the value loss against slow readings of their definitions."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch

from ctpo_megatron.algorithms.critic import gae, value_loss
from tests.support.naive_scan import borders
from tests.support.oracles_critic import gae_by_loop, value_point

LENGTHS = (5, 0, 1, 17, 9)


def streams(seed: int, lengths: tuple[int, ...] = LENGTHS) -> dict[str, torch.Tensor]:
    """Rewards, values, a mask with holes; NaN where masked, and the third sequence all masked."""
    draw = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    mask = torch.rand(size, generator=draw) < 0.7
    mask[lengths[0] : lengths[0] + 1] = False
    rewards, values, old = (torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(3))
    for stream in (rewards, values, old):
        stream[~mask] = math.nan
    return {"rewards": rewards, "values": values, "old": old, "mask": mask}


@pytest.mark.parametrize(("gamma", "lam"), list(product((0.0, 0.9, 1.0), (0.0, 0.5, 0.95, 1.0))))
def test_gae_is_the_sum_of_discounted_differences(gamma: float, lam: float) -> None:
    for seed in range(3):
        given = streams(seed)
        found = gae(
            rewards=given["rewards"],
            values=given["values"],
            mask=given["mask"],
            cu_seqlens=borders(LENGTHS),
            gamma=gamma,
            lam=lam,
        )
        advantages, returns = [], []
        for part in zip(*(given[name].split(LENGTHS) for name in ("rewards", "values", "mask")), strict=True):
            wanted = gae_by_loop(*(of.tolist() for of in part), gamma, lam)
            advantages += wanted[0]
            returns += wanted[1]
        assert found.advantages.tolist() == pytest.approx(advantages, rel=1e-12, abs=1e-12)
        assert found.returns.tolist() == pytest.approx(returns, rel=1e-12, abs=1e-12)


def test_limits_of_gae() -> None:
    """lambda 1: the discounted return less the value; lambda 0: one difference; no value function: the return itself."""
    rewards, values = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([0.5, -1.0, 3.0]).double()
    mask, cu = torch.ones(3, dtype=torch.bool), torch.tensor([0, 3])
    common = {"rewards": rewards, "mask": mask, "cu_seqlens": cu, "gamma": 0.5}
    assert gae(values=values, lam=1.0, **common).returns.tolist() == [1.0, 2.0, 2.0]
    assert gae(values=values, lam=0.0, **common).returns.tolist() == [-0.5, 2.5, 2.0]
    assert gae(values=torch.zeros(3), lam=1.0, **common).advantages.tolist() == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("wrong", [{"gamma": 1.1, "lam": 1.0}, {"gamma": 1.0, "lam": -0.1}])
def test_a_discount_outside_is_refused(wrong: dict[str, float]) -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="allowed are numbers from 0 to 1"):
        gae(rewards=one, values=one, mask=one.bool(), cu_seqlens=torch.tensor([0, 1]), **wrong)


@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
def test_the_value_loss_is_its_definition(clip: float | None) -> None:
    given, weights = streams(7), [0.5, 1.0, 2.0, 0.25, 3.0]
    values = given["values"].clone().requires_grad_()
    rng = random.Random(1)
    returns = torch.tensor([rng.gauss(0, 1) for _ in values], dtype=torch.float64)
    out = value_loss(
        values=values,
        old_values=given["old"],
        returns=torch.where(given["mask"], returns, math.nan),
        mask=given["mask"],
        cu_seqlens=borders(LENGTHS),
        weights=torch.tensor(weights),
        clip=clip,
    )
    out.loss.backward()
    of_token = torch.tensor(weights).repeat_interleave(torch.tensor(LENGTHS)).tolist()
    cut, losses, slopes = 0, [], []
    rows = zip(given["values"].tolist(), given["old"].tolist(), returns.tolist(), given["mask"].tolist(), of_token, strict=True)
    for value, old, target, is_policy, weight in rows:
        loss, slope = value_point(value, old, target, clip) if is_policy else (0.0, 0.0)
        cut += loss > 0 and slope == 0
        losses.append(loss)
        slopes.append(weight * slope)
    assert out.token_loss.tolist() == pytest.approx(losses, rel=1e-12, abs=1e-15)
    assert values.grad.tolist() == pytest.approx(slopes, rel=1e-12, abs=1e-15)
    assert out.loss.item() == pytest.approx(math.fsum(w * x for w, x in zip(of_token, losses, strict=True)), rel=1e-12)
    assert out.stats.means["clip_fraction"].total.item() == cut
    assert (cut > 0) == (clip is not None)
