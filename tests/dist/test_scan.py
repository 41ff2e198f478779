"""Scans across context-parallel ranks against those of whole sequences, and what they send."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.algorithms import Channel, LocalScan, Scan, policy_loss
from ctpo_megatron.algorithms.operators import MAX_TOKENS
from ctpo_megatron.mcore.rank import RankInfo
from ctpo_megatron.parallel import (
    ContextParallelScan,
    Layout,
    MicroBatchScans,
    shard,
    shard_indices,
    unshard,
    zigzag_shard,
    zigzag_unshard,
)
from ctpo_megatron.parallel.gather import all_gather_single
from tests.support.faults import OF_SCANS
from tests.support.naive_scan import borders, every_channel
from tests.support.ranks import run_ranks
from tests.support.spread import Ranks
from tests.support.traffic import Call, Traffic

pytestmark = pytest.mark.dist

RANKS, SIZES, LAYOUTS = 4, (2, 4), ("zigzag", "contiguous")
CUTS = list(product(SIZES, LAYOUTS))
# multiples of 2 * 4; none, one and many tokens in a piece
PACKS = {"mixed": (8, 40, 0, 16, 8, 120, 24), "short": (8, 16), "long": (800, 1600), "empty": (0, 0), "alone": (8,)}
LENGTHS = PACKS | {"odd": (1, 3, 0, 5)}
ROUNDED = ("mixed", "empty")  # those that float64 sums are tried on
QUANTILES = (0.0, 0.5, 0.9, 1.0)
OBJECTIVES = {
    "ctpo": {"type": "ctpo"},
    "trm": {"type": "trm", "max_divergence": 0.05},
    "measured ctpo": {"type": "ctpo", "band": "entropy"},
    "kpop": {"type": "kpop", "gate": "prefix_sum"},
    "cppo": {"type": "cppo"},
    "adaptive cppo": {"type": "cppo", "adaptive_budget": True},
}
# rows that the scan of a pack sends: position and prefix; trm: a maximum and a sum; cppo: a sum and a ramp's three numbers
# a measured band: its sum and total
ROWS = {"ctpo": 2, "trm": 4, "measured ctpo": 4, "kpop": 3, "cppo": 6, "adaptive cppo": 6}
Arrays = dict[str, Any]
# micro-batches of one step: pack, context-parallel size, order of the pieces
CHANGING: list[tuple[str, int, Layout]] = [
    ("long", 4, "zigzag"),
    ("odd", 1, "zigzag"),
    ("mixed", 2, "contiguous"),
    ("mixed", 4, [[5, 0], [1, 4], [7, 2], [3, 6]]),
    ("short", 2, [[3, 1], [0, 2]]),
    ("mixed", 2, "zigzag"),
]


def streams(pack: str) -> dict[str, Tensor]:
    """Values beyond +-20 among them, factors in [0, 1], a mask with holes and a sequence without any policy token; restarts."""
    draw, size = torch.Generator().manual_seed(len(pack)), sum(LENGTHS[pack])
    mask = torch.rand(size, generator=draw) < 0.7
    mask[48:64] = False  # all of the fourth sequence of `mixed`
    return {
        "x": 10 * torch.randn(size, generator=draw, dtype=torch.float64),
        "other": torch.rand(size, generator=draw, dtype=torch.float64),
        "mask": mask,
        "restarts": torch.rand(size, generator=draw) < 0.08,
    }


def streams_of(scan: ContextParallelScan, layout: str, pack: str) -> dict[str, Tensor]:
    """A rank's part of a pack's streams."""
    return {name: shard(stream, borders(LENGTHS[pack]), scan.rank, scan.size, layout) for name, stream in streams(pack).items()}


# ---- on the ranks


def on_ranks(info: RankInfo) -> Arrays:
    """What a rank finds in every cut: its scans, with and without faults, and the calls of its process group."""
    ranks = Ranks(info, (1, *SIZES))
    found: Arrays = {"counter": counted_collectives(ranks.group[4]), "refused": refusals(ranks.group[2])}
    found |= {(1, layout): scanned(ContextParallelScan(ranks.group[1], layout), layout, "odd") for layout in LAYOUTS}
    for size, layout in CUTS:
        scan = ContextParallelScan(ranks.group[size], layout)
        for pack in PACKS:
            found[size, layout, True, pack] = scanned(scan, layout, pack)
            found[size, layout, "traffic", pack] = traffic_of_scan(scan, layout, pack)
        for pack in ROUNDED:
            found[size, layout, False, pack] = scanned(ContextParallelScan(ranks.group[size], layout, exact=False), layout, pack)
        for name, fault in OF_SCANS.items():
            with fault():
                found[size, layout, name] = scanned(ContextParallelScan(ranks.group[size], layout), layout, "mixed")
        for pack, name in product(("short", "long"), OBJECTIVES):
            found[size, layout, pack, name] = traffic_of_loss(scan, layout, pack, name)
    scans = MicroBatchScans({size: ranks.group[size] for size in SIZES})
    found |= {("changing", number): shared_loss(scans, number, ranks.rank) for number in range(len(CHANGING))}
    dist.destroy_process_group()
    return found


def shared_loss(scans: MicroBatchScans, number: int, rank: int) -> Arrays:
    """A rank's part of one micro-batch of a step whose context parallelism changes from micro-batch to micro-batch."""
    pack, size, layout = CHANGING[number]
    return loss_of(pack, scans.of(size, layout), rank % size, size, layout)


def loss_of(pack: str, scan: Scan, rank: int, size: int, layout: Layout) -> Arrays:
    """Loss, token losses and gradient of minpro, which carries a sum and a minimum, with a correction and restarts."""
    cu = borders(LENGTHS[pack])
    mine = {name: shard(stream, cu, rank, size, layout) for name, stream in streams(pack).items()}
    logp = (-mine["x"].abs() / 40).requires_grad_()
    out = policy_loss(
        {"type": "minpro"},
        logp=logp,
        old_logp=-mine["other"] / 4,
        rollout_logp=-mine["other"] / 5,
        advantages=mine["x"].sign(),
        mask=mine["mask"],
        cu_seqlens=cu,
        restarts=mine["restarts"],
        correction={"type": "truncate", "level": "sequence"},
        scan=scan,
    )
    out.loss.backward()
    return {"loss": out.loss.item(), "token_loss": out.token_loss.detach().numpy(), "gradient": logp.grad.numpy()}


def scanned(scan: ContextParallelScan, layout: str, pack: str) -> Arrays:
    """Every channel in one run, quantiles, and the number of each token's sequence."""
    cu, mine = borders(LENGTHS[pack]), streams_of(scan, layout, pack)
    results = scan.run([asked.channel for asked in every_channel(**mine, exact=scan.exact)], cu)
    return {
        "values": [each.values.numpy() for each in results],
        "totals": [each.totals.numpy() for each in results],
        "quantiles": [scan.quantile(mine["x"], mine["mask"], cu, q).numpy() for q in QUANTILES],
        "per token": scan.per_token(torch.arange(len(cu) - 1), cu, mine["x"].numel()).numpy(),
    }


def traffic_of_scan(scan: ContextParallelScan, layout: str, pack: str) -> dict[str, list[Call]]:
    """Calls of a run of every channel, and of a quantile."""
    cu, mine = borders(LENGTHS[pack]), streams_of(scan, layout, pack)
    channels = [asked.channel for asked in every_channel(**mine, exact=scan.exact)]
    with Traffic() as of_run:
        scan.run(channels, cu)
    with Traffic() as of_quantile:
        scan.quantile(mine["x"], mine["mask"], cu, 0.9)
    return {"run": of_run.calls, "quantile": of_quantile.calls}


def traffic_of_loss(scan: ContextParallelScan, layout: str, pack: str, objective: str) -> dict[str, list[Call]]:
    """Calls in the forward and in the backward of a loss."""
    cu, mine = borders(LENGTHS[pack]), streams_of(scan, layout, pack)
    logp = (-mine["x"].abs()).requires_grad_()
    old, options = -mine["other"], OBJECTIVES[objective]
    with Traffic() as forward:
        out = policy_loss(
            options, logp=logp, old_logp=old, rollout_logp=old, advantages=mine["x"], mask=mine["mask"], cu_seqlens=cu, scan=scan
        )
    with Traffic() as backward:
        out.loss.backward()
    return {"forward": forward.calls, "backward": backward.calls}


def counted_collectives(group: dist.ProcessGroup) -> list[str]:
    """What the counter sees of collectives of every kind."""
    from torch.distributed import _functional_collectives as functional

    four, one = torch.zeros(4), torch.zeros(1)
    with Traffic() as traffic:
        all_gather_single(four, one, group)
        dist.all_gather([torch.zeros(1) for _ in range(4)], one, group=group)
        dist.all_reduce(one, group=group)
        dist.broadcast(one, 0, group=group)
        dist.all_to_all_single(torch.zeros(4), four, group=group)
        functional.all_reduce(one, "sum", group).sum()
    return [call.name for call in traffic.calls]


def refusals(group: dist.ProcessGroup) -> list[str]:
    """Messages of what every rank refuses before anything is sent."""
    scan, half = ContextParallelScan(group), MAX_TOKENS // 2 + 1
    tokens = torch.zeros(1)
    calls = [
        lambda: ContextParallelScan(group, "spiral"),
        lambda: scan.run([Channel(tokens.expand(half))], torch.tensor([0, 2 * half])),
        lambda: scan.run([Channel(tokens, reach="suffix", restarts=tokens.bool())], torch.tensor([0, 4])),
    ]
    messages = []
    for call in calls:
        try:
            messages.append(f"not refused: {call()}")
        except ValueError as error:
            messages.append(str(error))
    return messages


# ---- what is checked


@pytest.fixture(scope="module")
def per_rank() -> list[Arrays]:
    return run_ranks(RANKS, on_ranks)


def assert_scans_are_local(replicas: list[list[Arrays]], layout: str, exact: bool, pack: str) -> None:
    """Scans of the ranks of every replica against the scan of whole sequences."""
    cu, whole = borders(LENGTHS[pack]), streams(pack)
    asked, local = every_channel(**whole, exact=exact), LocalScan(exact)
    bound = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    same = partial(torch.testing.assert_close, rtol=0, atol=0)
    for ranks in replicas:
        for i, (each, want) in enumerate(zip(asked, local.run([each.channel for each in asked], cu), strict=True)):
            compare = same if each.name.startswith(("exact sum", "count", "min", "max")) else bound
            if each.channel.reach == "sequence":
                assert all(rank["values"][i].size == 0 for rank in ranks)
            else:
                compare(unshard([torch.from_numpy(rank["values"][i]) for rank in ranks], cu, layout), want.values, msg=each.name)
            for rank in ranks:
                compare(torch.from_numpy(rank["totals"][i]), want.totals, msg=f"totals of {each.name}")
        for rank, (i, q) in product(ranks, enumerate(QUANTILES)):
            same(torch.from_numpy(rank["quantiles"][i]), local.quantile(whole["x"], whole["mask"], cu, q), msg=f"quantile {q}")
        ids = unshard([torch.from_numpy(rank["per token"]) for rank in ranks], cu, layout)
        assert torch.equal(ids, local.per_token(torch.arange(len(cu) - 1), cu, ids.numel()))


def replicas_of(per_rank: list[Arrays], size: int, *key: Any) -> list[list[Arrays]]:
    """Results of the ranks, [replicas][size]."""
    return [[rank[size, *key] for rank in per_rank[first : first + size]] for first in range(0, RANKS, size)]


@pytest.mark.parametrize(("exact", "pack"), [*((True, pack) for pack in PACKS), *((False, pack) for pack in ROUNDED)])
@pytest.mark.parametrize(("size", "layout"), CUTS)
def test_scans_of_shards_are_scans_of_whole_sequences(
    per_rank: list[Arrays], size: int, layout: str, exact: bool, pack: str
) -> None:
    assert_scans_are_local(replicas_of(per_rank, size, layout, exact, pack), layout, exact, pack)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_takes_sequences_of_any_length(per_rank: list[Arrays], layout: str) -> None:
    assert_scans_are_local(replicas_of(per_rank, 1, layout), layout, True, "odd")


@pytest.mark.parametrize("number", range(len(CHANGING)))
def test_context_parallelism_may_change_from_micro_batch_to_micro_batch(per_rank: list[Arrays], number: int) -> None:
    pack, size, layout = CHANGING[number]
    whole, cu = loss_of(pack, LocalScan(), 0, 1, "zigzag"), borders(LENGTHS[pack])
    for ranks in [[rank["changing", number] for rank in per_rank[first : first + size]] for first in range(0, RANKS, size)]:
        for name in ("token_loss", "gradient"):
            joined = unshard([torch.from_numpy(rank[name]) for rank in ranks], cu, layout)
            assert torch.equal(joined, torch.from_numpy(whole[name])), name
        assert sum(rank["loss"] for rank in ranks) == pytest.approx(whole["loss"], rel=1e-12)


def test_a_group_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="over 3 context-parallel ranks; this rank has groups of 1"):
        MicroBatchScans({}).of(3)


@pytest.mark.parametrize("pieces", [[[0, 1]], [[0], [1, 2]], [[0, 1], [1, 2]], [[], []], [[1, 2], [3, 4]]])
def test_pieces_that_are_no_order_are_refused(pieces: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="once each"):
        shard_indices(torch.tensor([0, 8]), 0, 2, pieces)


@pytest.mark.parametrize("fault", OF_SCANS)
@pytest.mark.parametrize(("size", "layout"), CUTS)
def test_a_planted_fault_is_found(per_rank: list[Arrays], size: int, layout: str, fault: str) -> None:
    with pytest.raises(AssertionError):
        assert_scans_are_local(replicas_of(per_rank, size, layout, fault), layout, True, "mixed")


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize(("size", "layout"), CUTS)
def test_all_channels_take_one_collective_whatever_the_tokens(per_rank: list[Arrays], size: int, layout: str, pack: str) -> None:
    asked = every_channel(**streams(pack), exact=True)
    rows = sum(len(each.channel.operator.identity) for each in asked)
    if sum(LENGTHS[pack]):
        rows += sum(each.channel.restarts is not None for each in asked)  # one more: whether a piece holds a restart
    given, tokens = bytes_given(rows, layout, pack), sum(LENGTHS[pack]) // size
    for rank in per_rank:
        calls = rank[size, layout, "traffic", pack]
        assert calls["run"] == [("_allgather_base_", (size * given, given))]
        # an order statistic is no sum of parts: it takes one number per token
        assert calls["quantile"] == [("_allgather_base_", (size * tokens * 8, tokens * 8))]


def bytes_given(rows: int, layout: str, pack: str) -> int:
    """What a rank sends: 8 bytes per row, sequence and piece."""
    return rows * len(PACKS[pack]) * (2 if layout == "zigzag" else 1) * 8


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("size", "layout"), CUTS)
def test_a_loss_takes_one_collective_and_its_backward_none(
    per_rank: list[Arrays], size: int, layout: str, objective: str
) -> None:
    for rank, pack in product(per_rank, ("short", "long")):
        calls = rank[size, layout, pack, objective]
        given, tokens = bytes_given(ROWS[objective], layout, pack), sum(LENGTHS[pack]) // size
        expected = [("_allgather_base_", (size * given, given))]
        if objective == "adaptive cppo":  # a quantile
            expected.append(("_allgather_base_", (size * tokens * 8, tokens * 8)))
        assert calls == {"forward": expected, "backward": []}


def test_the_counter_sees_every_kind_of_collective(per_rank: list[Arrays]) -> None:
    names = ["_allgather_base_", "allgather_", "allreduce_", "broadcast_", "alltoall_base_", "all_reduce"]
    for rank in per_rank:
        assert [name for name in rank["counter"] if name not in ("wait_tensor", "_wrap_tensor_autograd")] == names


def test_what_every_rank_refuses(per_rank: list[Arrays]) -> None:
    unknown, long, restarted = "unknown layout 'spiral'", f"exact prefix sums hold up to {MAX_TOKENS}", "takes no restarts"
    for rank in per_rank:
        assert [part in message for part, message in zip((unknown, long, restarted), rank["refused"], strict=True)] == [True] * 3


# ---- layouts, without ranks


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_make_up_the_pack(size: int, layout: str) -> None:
    for lengths in PACKS.values():
        x, cu = torch.arange(2 * sum(lengths)).view(-1, 2), borders(lengths)
        shards = [shard(x, cu, rank, size, layout) for rank in range(size)]
        assert torch.equal(unshard(shards, cu, layout), x)
        if layout == "zigzag":
            assert torch.equal(zigzag_unshard([zigzag_shard(x, cu, rank, size) for rank in range(size)], cu), x)


def test_places_of_pieces_and_refusals() -> None:
    cu = torch.tensor([0, 8, 16])
    assert shard_indices(cu, 1, 2, "zigzag").tolist() == [2, 3, 4, 5, 10, 11, 12, 13]
    assert shard_indices(cu, 0, 4, "zigzag").tolist() == [0, 7, 8, 15]
    assert shard_indices(cu, 1, 2, "contiguous").tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    with pytest.raises(ValueError, match="sequence 1 has length 6; zigzag over 2 ranks needs multiples of 4"):
        zigzag_shard(torch.arange(14), torch.tensor([0, 8, 14]), 0, 2)
    with pytest.raises(ValueError, match="sequence 0 has length 6; contiguous over 4 ranks needs multiples of 4"):
        shard(torch.arange(6), torch.tensor([0, 6]), 0, 4, "contiguous")
    with pytest.raises(ValueError, match="unknown layout 'spiral'; allowed: zigzag, contiguous"):
        shard_indices(cu, 0, 2, "spiral")
