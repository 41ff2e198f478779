"""GAE and distillation on context-parallel shards against whole sequences, and what they send, alone and with an objective."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.algorithms import LocalScan, PolicyLoss, Scan, make_recipe, recipe_loss
from ctpo_megatron.algorithms.critic import gae
from ctpo_megatron.algorithms.distillation import distillation_loss, teacher_signal, weighted_signal
from ctpo_megatron.mcore.rank import RankInfo
from ctpo_megatron.parallel import ContextParallelScan, shard, unshard
from tests.support.naive_scan import borders
from tests.support.oracles_critic import gae_by_loop, prefix_weights_by_loop
from tests.support.ranks import run_ranks
from tests.support.spread import Ranks
from tests.support.traffic import Traffic

pytestmark = pytest.mark.dist

RANKS = 4
CUTS = list(product((2, 4), ("zigzag", "contiguous")))
LENGTHS = (16, 40, 0, 8, 120)
GAMMA, LAM = 0.99, 0.9
BOUNDS = (("advantages", 1e-12), ("returns", 1e-12), ("token", 0.0), ("grad", 0.0), ("objective", 0.0), ("joined", 0.0))
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0], dtype=torch.float64)


def streams() -> dict[str, Tensor]:
    """Three streams of values, NaN where masked, and a mask with holes; the fourth sequence has no policy token."""
    draw, size = torch.Generator().manual_seed(5), sum(LENGTHS)
    mask = torch.rand(size, generator=draw) < 0.7
    mask[56:64] = False
    found = {name: torch.randn(size, generator=draw, dtype=torch.float64) for name in ("a", "b", "c")}
    return {"mask": mask, **{name: torch.where(mask, stream, math.nan) for name, stream in found.items()}}


def evaluate(given: dict[str, Tensor], scan: Scan) -> dict[str, Any]:
    """Advantages, returns, and a distillation's token losses, gradient and share; and the collectives of each."""
    cu = borders(LENGTHS)
    with Traffic() as of_gae:
        estimated = gae(rewards=given["a"], values=given["b"], mask=given["mask"], cu_seqlens=cu, gamma=GAMMA, lam=LAM, scan=scan)
    logp = given["a"].clone().requires_grad_()
    common = {"sampled_logp": given["b"], "teacher_logp": given["c"], "mask": given["mask"], "cu_seqlens": cu, "scan": scan}
    with Traffic() as forward:
        out = distillation_loss(logp=logp, **common, weights=WEIGHTS)
    with Traffic() as backward:
        out.loss.backward()
    alone = logp.grad.clone()
    with Traffic() as together:
        objective, joined = with_an_objective(logp, common)
    (gradient,) = torch.autograd.grad(joined.loss, logp)
    assert torch.equal(gradient, alone), "the same scan, whoever else takes part"
    tensors = {
        "objective": objective.token_loss,
        "joined": joined.token_loss,
        "advantages": estimated.advantages,
        "returns": estimated.returns,
        "token": out.token_loss,
        "grad": logp.grad,
    }
    calls = [len(traffic.calls) for traffic in (of_gae, forward, backward, together)]
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()} | {"loss": out.loss.item(), "calls": calls}


def with_an_objective(logp: Tensor, common: dict[str, Any]) -> tuple[PolicyLoss, PolicyLoss]:
    """CTPO's loss, and the distillation's whose channels went through the same scan."""
    recipe = make_recipe({"type": "ctpo"}, "sequence-mean", None, has_rollout=False)
    signal = teacher_signal(logp=logp, **{name: common[name] for name in ("sampled_logp", "teacher_logp", "mask")})
    at = {name: common[name] for name in ("cu_seqlens", "scan")} | {"weights": WEIGHTS}
    given = {"logp": logp, "old_logp": common["sampled_logp"], "advantages": common["teacher_logp"], "mask": common["mask"]}
    objective = recipe_loss(recipe, **given, **at, also=signal.channels)
    return objective, weighted_signal(signal, objective.also, **at, gamma=0.5)


def on_ranks(info: RankInfo) -> dict[Any, dict[str, Any]]:
    ranks = Ranks(info, (2, 4))
    found = {}
    for size, layout in CUTS:
        scan = ContextParallelScan(ranks.group[size], layout)
        mine = {name: shard(stream, borders(LENGTHS), scan.rank, size, layout) for name, stream in streams().items()}
        found[size, layout] = evaluate(mine, scan)
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def per_rank() -> list[dict[Any, dict[str, Any]]]:
    return run_ranks(RANKS, on_ranks)


@pytest.mark.parametrize(("size", "layout"), CUTS)
def test_shards_are_the_whole(per_rank: list[dict[Any, dict[str, Any]]], size: int, layout: str) -> None:
    whole = evaluate(streams(), LocalScan())
    for first in range(0, RANKS, size):
        found = [rank[size, layout] for rank in per_rank[first : first + size]]
        for name, bound in BOUNDS:
            joined = unshard([torch.from_numpy(each[name]) for each in found], borders(LENGTHS), layout)
            torch.testing.assert_close(joined, torch.from_numpy(whole[name]), rtol=bound, atol=bound, msg=name)
        assert math.fsum(each["loss"] for each in found) == pytest.approx(whole["loss"], rel=1e-12)
        assert all(each["calls"] == [1, 1, 0, 1] for each in found)


def test_the_whole_is_the_definition() -> None:
    given, whole = streams(), evaluate(streams(), LocalScan())
    advantages, weights = [], []
    for a, b, c, mask in zip(*(given[name].split(LENGTHS) for name in ("a", "b", "c", "mask")), strict=True):
        advantages += gae_by_loop(a.tolist(), b.tolist(), mask.tolist(), GAMMA, LAM)[0]
        weights += prefix_weights_by_loop((c - b).abs().tolist(), mask.tolist(), 0.5)
    assert whole["advantages"].tolist() == pytest.approx(advantages, rel=1e-12, abs=1e-12)
    plain = torch.where(given["mask"], (given["b"] - given["c"]) * given["a"], 0.0)
    assert whole["token"].tolist() == pytest.approx((torch.tensor(weights) * plain).tolist(), rel=1e-6, abs=1e-9)
