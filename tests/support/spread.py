"""A batch of sequences cut into packs, micro-batches and context-parallel shards, evaluated, and put together again."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.algorithms import LocalScan, Scan, Support, per_token, policy_loss, sequence_weights
from ctpo_megatron.algorithms.statistics import Stats, Weighted, merge
from ctpo_megatron.mcore.rank import RankInfo
from ctpo_megatron.parallel import ContextParallelScan, Layout, shard, unshard
from tests.support.naive_scan import borders
from tests.support.oracles import Row
from tests.support.oracles_cases import TOP_K, Case, looks_at_top, packed

Shares = dict[int, dict[str, Any]]  # of one rank, by micro-batch; arrays, since a tensor outlives its process only as a handle
PADDING = {  # what stands under the mask must not matter
    "logp": math.nan,
    "old_logp": math.inf,
    "rollout_logp": -math.inf,
    "advantage": math.nan,
    "top_logp": [math.nan] * TOP_K,
    "top_rollout": [math.inf] * TOP_K,
    "mask": False,
    "restart": False,
}


class Spread(NamedTuple):
    """One way to spread a batch. Micro-batches go in turn to the replicas, of which there are ranks / cp."""

    cp: int = 1
    layout: Layout = "zigzag"
    micro_batches: int = 1
    order: int = 0  # of the sequences: as they are, backwards, or every second one first
    exact: bool = True
    dtype: str = "float64"
    part: int = 2**15  # tokens whose loss is found at once

    @property
    def pieces(self) -> int:
        """What the length of a sequence must be a multiple of."""
        return 1 if self.cp == 1 else self.cp * (2 if self.layout == "zigzag" else 1)

    def packs(self, sequences: int) -> list[list[int]]:
        """The sequences of each micro-batch."""
        numbers = list(range(sequences))
        ordered = (numbers, numbers[::-1], numbers[1::2] + numbers[::2])[self.order]
        return [ordered[n :: self.micro_batches] for n in range(self.micro_batches)]


class Found(NamedTuple):
    """What a batch gives, in the order of its own sequences."""

    loss: Tensor
    token_loss: Tensor  # [T]
    gradient: Tensor  # [T]
    stats: Stats


class Ranks:
    """This process as one of several, with the replica that it belongs to for each size of context parallelism."""

    def __init__(self, info: RankInfo, sizes: Sequence[int]) -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{info.master_addr}:{info.master_port}",
            rank=info.rank,
            world_size=info.world_size,
            timeout=datetime.timedelta(seconds=60),
        )
        self.rank, self.world = info.rank, info.world_size
        self.group = {size: self._group(size) for size in sizes}

    def _group(self, size: int) -> dist.ProcessGroup:
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, self.world, size)]
        return groups[self.rank // size]

    def shares(self, case: Case, spread: Spread) -> Shares:
        """What this rank's shards give."""
        scan = LocalScan(spread.exact)
        if spread.cp > 1:
            scan = ContextParallelScan(self.group[spread.cp], spread.layout, spread.exact)
        return shares(case, spread, scan, self.rank, self.world)


def shares(case: Case, spread: Spread, scan: Scan, rank: int = 0, world: int = 1) -> Shares:
    """What a rank's shards of the micro-batches of its replica give."""
    replica, cp_rank = divmod(rank, spread.cp)
    weights = None if spread.micro_batches == 1 else whole_batch_weights(case)
    found = {}
    with patch.object(per_token, "PART", spread.part):
        for number, members in enumerate(spread.packs(len(case.rows))):
            if number % (world // spread.cp) == replica:
                found[number] = _share(case, spread, members, weights, scan, cp_rank)
    return found


def whole_batch_weights(case: Case) -> Tensor:
    """The weight of each sequence [N], as the trainer finds it before it cuts the batch up."""
    aggregation = case.settings["aggregation"]
    constant = aggregation["tokens"] if isinstance(aggregation, Mapping) else 1.0
    signs = [
        sum((a > 0) - (a < 0) for a, is_policy in zip(row.advantage, row.mask, strict=True) if is_policy) for row in case.rows
    ]
    groups = case.settings.get("groups")
    return sequence_weights(
        aggregation["type"] if isinstance(aggregation, Mapping) else aggregation,
        torch.tensor([sum(row.mask) for row in case.rows]),
        constant=constant,
        groups=None if groups is None else torch.tensor(groups),
        signs=torch.tensor(signs),
    )


def _share(case: Case, spread: Spread, members: list[int], weights: Tensor | None, scan: Scan, cp_rank: int) -> dict[str, Any]:
    rows = [padded(case.rows[i], spread.pieces) for i in members]
    cu = borders([len(row.mask) for row in rows])

    def mine(name: str) -> Tensor:
        stream = packed(rows, name)
        stream = stream if stream.dtype == torch.bool else stream.to(getattr(torch, spread.dtype))
        return shard(stream, cu, cp_rank, spread.cp, spread.layout)

    tops = looks_at_top(case.objective)
    logp, mask = mine("logp").requires_grad_(), mine("mask")
    out = policy_loss(
        case.objective,
        logp=logp,
        old_logp=mine("old_logp"),
        rollout_logp=mine("rollout_logp"),
        advantages=mine("advantage"),
        mask=mask,
        cu_seqlens=cu,
        correction=case.settings["correction"],
        delight=case.settings.get("delight"),
        restarts=mine("restart") if any(any(row.restart) for row in case.rows) else None,
        support=Support(mine("top_logp"), mine("top_rollout")) if tops else None,
        sequence_ids=torch.tensor(members),
        scan=scan,
        **_averaging(case, members, weights),
    )
    out.loss.backward()
    arrays = {"share": out.loss, "token_loss": out.token_loss, "gradient": logp.grad}
    return {
        **{name: value.detach().numpy() for name, value in arrays.items()},
        "stats": mapped(out.stats, Tensor.numpy),
        "policy_tokens": int(mask.sum()),
    }


def _averaging(case: Case, members: list[int], weights: Tensor | None) -> dict[str, Any]:
    """How a pack is averaged: by the whole batch's weights, or, where it is the whole batch, by the loss itself."""
    if weights is not None:
        return {"weights": weights[members]}
    groups = case.settings.get("groups")
    return {
        "aggregation": case.settings["aggregation"],
        "groups": None if groups is None else torch.tensor(groups)[members],
    }


def padded(row: Row, multiple: int) -> Row:
    """A row with garbage behind it, up to a multiple."""
    missing = -len(row.mask) % multiple
    return Row(**{f.name: getattr(row, f.name) + [PADDING[f.name]] * missing for f in fields(Row)})


def joined(case: Case, spread: Spread, ranks: Sequence[Shares]) -> Found:
    """A batch from the shares of all ranks."""
    replicas = len(ranks) // spread.cp
    parts: list[dict[str, Any]] = []
    streams: dict[str, dict[int, Tensor]] = {"token_loss": {}, "gradient": {}}
    for number, members in enumerate(spread.packs(len(case.rows))):
        first = number % replicas * spread.cp
        shards = [ranks[rank][number] for rank in range(first, first + spread.cp)]
        parts += shards
        lengths = [len(padded(case.rows[i], spread.pieces).mask) for i in members]
        for name, of_sequence in streams.items():
            pack = unshard([torch.from_numpy(each[name]) for each in shards], borders(lengths), spread.layout)
            of_sequence.update(zip(members, pack.split(lengths), strict=True))
    for of_sequence in streams.values():
        for i, row in enumerate(case.rows):
            assert not of_sequence[i][len(row.mask) :].any(), "padding has a loss"
            of_sequence[i] = of_sequence[i][: len(row.mask)]
    whole = {name: torch.cat([of_sequence[i] for i in range(len(case.rows))]) for name, of_sequence in streams.items()}
    stats = merge(mapped(part["stats"], torch.from_numpy) for part in parts)
    return Found(summed([torch.from_numpy(part["share"]) for part in parts]), **whole, stats=stats)


def mapped(stats: Stats, function: Callable[[Any], Any]) -> Stats:
    """Statistics with `function` of each tensor or array: between processes they are arrays."""
    plain = ({name: function(value) for name, value in part.items()} for part in (stats.sums, stats.maxima, stats.minima))
    sums, maxima, minima = plain
    return Stats(sums, {name: Weighted(*map(function, mean)) for name, mean in stats.means.items()}, maxima, minima)


def summed(shares: list[Tensor]) -> Tensor:
    """The loss."""
    return torch.stack(shares).sum()


def in_one_pack(case: Case, *, exact: bool = True, dtype: str = "float64") -> Found:
    """The whole batch on one rank."""
    spread = Spread(exact=exact, dtype=dtype)
    return joined(case, spread, [shares(case, spread, LocalScan(exact))])
