"""The prefix scan across context-parallel ranks: the same bits as on one rank, with one collective and none in the backward."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ctpo_megatron.algorithms import LocalScan, policy_loss
from ctpo_megatron.mcore.engine import RankInfo
from ctpo_megatron.parallel import ContextParallelScan, zigzag_shard, zigzag_unshard

pytestmark = pytest.mark.dist

LENGTHS = (8, 40, 16, 8, 120, 24)  # multiples of 2 * 4
OBJECTIVES = ({"type": "ctpo"}, {"type": "ctpo", "ratio": "geomean", "power": -0.5}, {"type": "grpo"})
AGGREGATIONS = ("token-mean", "sequence-mean", "sequence-sum")


def streams() -> dict[str, torch.Tensor]:
    """A pack with holes, a sequence without any policy token, large drift, and advantages of both signs."""
    gen = torch.Generator().manual_seed(5)
    total = sum(LENGTHS)
    logp = -3 * torch.rand(total, generator=gen, dtype=torch.float64)
    mask = torch.rand(total, generator=gen) < 0.7
    mask[48:64] = False  # all of the third sequence
    return {
        "logp": logp,
        "old_logp": logp + 0.05 * torch.randn(total, generator=gen, dtype=torch.float64),
        "advantages": torch.randn(total, generator=gen, dtype=torch.float64),
        "mask": mask,
    }


def cu_seqlens() -> torch.Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def shard_loss(info: RankInfo) -> list[dict[str, Any]]:
    """On every rank: loss share, token losses and gradients of its shard, for CP 2 (two replicas) and CP 4."""
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{info.master_addr}:{info.master_port}",
        rank=info.rank,
        world_size=info.world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    results = []
    for size in (2, 4):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, info.world_size, size)]
        group = groups[info.rank // size]
        for objective in OBJECTIVES:
            for aggregation in AGGREGATIONS:
                results.append(one_case(group, objective, aggregation))
    dist.destroy_process_group()
    return results


def one_case(group: dist.ProcessGroup, objective: dict[str, Any], aggregation: str) -> dict[str, Any]:
    cu, calls = cu_seqlens(), count_collectives()
    local = {k: zigzag_shard(v, cu, group.rank(), group.size()) for k, v in streams().items()}
    logp = local.pop("logp").clone().requires_grad_()
    with calls as counted:
        scan = ContextParallelScan(group)
        out = policy_loss(objective, logp=logp, **local, cu_seqlens=cu, aggregation=aggregation, scan=scan)
        forward = len(counted)
        out.loss.backward()
        backward = len(counted) - forward
    case = {"size": group.size(), "objective": objective, "aggregation": aggregation}
    values = {"share": out.loss, "token_loss": out.token_loss, "grad": logp.grad}
    # arrays, since a tensor would outlive its process only as a handle
    return case | {name: value.detach().numpy() for name, value in values.items()} | {"forward": forward, "backward": backward, "bytes": sum(counted)}


class count_collectives:  # noqa: N801 - reads like a function where it is used
    """Bytes of every collective of torch.distributed that is called inside."""

    NAMES = ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "reduce_scatter_tensor", "all_to_all_single")

    def __enter__(self) -> list[int]:
        self.originals, counted = {name: getattr(dist, name) for name in self.NAMES}, []

        def counting(function):
            def call(tensor, *args, **kwargs):
                counted.append(tensor.numel() * tensor.element_size() if torch.is_tensor(tensor) else 0)
                return function(tensor, *args, **kwargs)

            return call

        for name, function in self.originals.items():
            setattr(dist, name, counting(function))
        return counted

    def __exit__(self, *_: object) -> None:
        for name, function in self.originals.items():
            setattr(dist, name, function)


@pytest.fixture(scope="module")
def per_rank() -> list[list[dict[str, Any]]]:
    return run_ranks(4, shard_loss)


def whole(objective: dict[str, Any], aggregation: str) -> dict[str, torch.Tensor]:
    data = streams()
    logp = data.pop("logp").clone().requires_grad_()
    out = policy_loss(objective, logp=logp, **data, cu_seqlens=cu_seqlens(), aggregation=aggregation, scan=LocalScan())
    out.loss.backward()
    return {"loss": out.loss.detach(), "token_loss": out.token_loss.detach(), "grad": logp.grad}


def test_shares_and_gradients_equal_the_whole(per_rank):
    for number, case in enumerate(per_rank[0]):
        size, expected = case["size"], whole(case["objective"], case["aggregation"])
        for first in range(0, 4, size):
            ranks = [per_rank[rank][number] for rank in range(first, first + size)]
            assert float(sum(r["share"] for r in ranks)) == pytest.approx(expected["loss"].item(), abs=1e-14)
            for name in ("token_loss", "grad"):
                joined = zigzag_unshard([torch.from_numpy(r[name]) for r in ranks], cu_seqlens())
                assert torch.equal(joined, expected[name]), (case["objective"], case["aggregation"], size, name)


def test_one_small_collective_and_none_backward(per_rank):
    for case in per_rank[0]:
        assert (case["forward"], case["backward"]) == (1, 0)
        # two int64 channels, two pieces per sequence and rank: independent of the number of tokens
        assert case["bytes"] == 2 * 2 * len(LENGTHS) * case["size"] * 8


def test_zigzag_round_trip_and_refusal():
    x, cu = torch.arange(sum(LENGTHS)), cu_seqlens()
    for size in (1, 2, 4):
        shards = [zigzag_shard(x, cu, rank, size) for rank in range(size)]
        assert torch.equal(zigzag_unshard(shards, cu), x)
    assert zigzag_shard(torch.arange(8), torch.tensor([0, 8]), 1, 2).tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="sequence 1 has length 6"):
        zigzag_shard(torch.arange(14), torch.tensor([0, 8, 14]), 0, 2)
