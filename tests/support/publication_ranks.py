"""A trainer of several ranks with faults to plant, driven from its rank 0, where the publisher runs in `test_publication`."""

from __future__ import annotations

import asyncio
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.weights import BroadcastTransport, Transport
from ctpo_megatron.engine.answers import Experts
from ctpo_megatron.engine.checksums import EngineDigests, PartDigests
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.weights.proof.canary import join_canary
from ctpo_megatron.weights.proof.expected import ExpectedDigests
from ctpo_megatron.weights.protocol import Bucket, Sent, Server
from ctpo_megatron.weights.source import RankWeights
from tests.support.engines import HOST

BUCKET_BYTES = 200_000  # several buckets for each sender
EXPERT = "model.layers.1.mlp.experts.2."


class FaultyStream:
    """A trainer rank (`weights.source.StreamsWeights`) whose weights go wrong in the publication after `plant`.

    With `cached` the digests are of what is sent. With all other faults they are of what should have been sent: see `Account`.
    """

    def __init__(self, rank: TrainerRank, strike: Callable[[], None]) -> None:
        self._rank, self._strike = rank, strike
        self._fault = ""
        self.wire = False  # whether the fault comes after the digests
        self.before: dict[str, Tensor] = {}  # of the last publication
        self.now: dict[str, Tensor] = {}

    @property
    def shape(self) -> ModelShape:
        return self._rank.shape

    @property
    def parallel(self) -> ParallelConfig:
        return self._rank.parallel

    @property
    def device(self) -> torch.device:
        return self._rank.device

    @property
    def token_multiple(self) -> int:
        return self._rank.token_multiple

    def senders(self, *, per_stage: bool) -> list[int]:
        return self._rank.senders(per_stage=per_stage)

    def place(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        return self._rank.place(micro_batches)

    def logp(self, micro_batches: list[MicroBatch], temperature: float) -> list[Tensor]:
        return self._rank.logp(micro_batches, temperature)

    def plant(self, fault: str | None) -> None:
        """What goes wrong in the next publication: once, its second attempt is sound."""
        self._fault = fault or ""

    def pieces(self) -> Mapping[str, Tensor]:
        return self._rank.pieces()

    def stream(self, bucket_bytes: int, *, per_stage: bool, memory: object, only: object) -> Iterator[Bucket]:
        """Small buckets of plain memory, of all tensors, whatever was asked for."""
        del bucket_bytes, memory, only
        fault, self._fault = self._fault, ""
        self.wire = fault not in ("", "cached")
        self.before, self.now = self.now, {}
        return self._spoilt(fault, per_stage)

    def _spoilt(self, fault: str, per_stage: bool) -> Iterator[Bucket]:
        number = 0  # of the buckets that this rank sends
        for bucket in self._rank.stream(BUCKET_BYTES, per_stage=per_stage):
            self.now |= {name: tensor.clone() for name, tensor in bucket}
            yield self._tampered(fault, bucket, number)
            number += bool(bucket)

    def _tampered(self, fault: str, bucket: Bucket, number: int) -> Bucket:
        second = bool(bucket) and (self._rank.rank.rank, number) == (0, 1)  # of the first sender
        if fault == "cached":
            return [(name, self.before[name]) for name, _ in bucket]
        if fault == "stale":
            return [(name, self.before[name] if name.startswith(EXPERT) else tensor) for name, tensor in bucket]
        if fault == "swapped":
            return swapped(bucket)
        if fault == "struck" and second:
            self._strike()
        return [] if fault == "dropped" and second else bucket


def swapped(bucket: Bucket) -> Bucket:
    """Both norms of each layer in each other's place."""
    tensors = dict(bucket)
    for one in [name for name in tensors if name.endswith("input_layernorm.weight")]:
        other = one.replace("input", "post_attention")
        tensors[one], tensors[other] = tensors[other], tensors[one]
    return list(tensors.items())


class Account:
    """Digests (`weights.transports.prefetch.DigestAccount`) of what a faulty stream should have given."""

    def __init__(self, layout: EngineLayout, source: FaultyStream) -> None:
        self._digests, self._source = ExpectedDigests(layout), source

    def add(self, bucket: Bucket) -> Mapping[str, PartDigests]:
        return self._digests.add([(name, self._source.now[name]) for name, _ in bucket] if self._source.wire else bucket)

    def remember(self, parts: Mapping[str, PartDigests]) -> None:
        self._digests.remember(parts)

    def digests(self) -> EngineDigests:
        if self._source.wire:  # tensors that never came too
            self._digests.add(list(self._source.now.items()))
        return self._digests.digests()


class Rank:
    """A rank of a trainer of two pipeline stages, whose weights move without training and may go wrong once on their way."""

    def __init__(self, model: Path, info: RankInfo, timeout_s: float) -> None:
        self.rank = info.rank
        self.strike: Callable[[], None] = lambda: None
        parallel = ParallelConfig(pp=2)
        self.trainer_rank = TrainerRank(str(model), parallel, None, info, device="cpu", dtype="float32", seed=1)
        self.source = FaultyStream(self.trainer_rank, lambda: self.strike())
        self.moves = 0
        self.weights = self._over(BroadcastTransport(timeout_s=timeout_s))

    def _over(self, transport: Transport) -> RankWeights:
        return RankWeights(self.source, transport, tp=1, address=HOST, new_account=lambda layout: Account(layout, self.source))

    def use(self, transport: Transport) -> None:
        """Another transport, from the next connection on."""
        self.weights.close()
        self.weights = self._over(transport)

    @torch.no_grad()
    def move(self, only: str = "") -> None:
        """Other weights, as after a step; or only those of parameters called `only` on the first stage."""
        self.moves += 1
        for model in self.trainer_rank.models:
            for name, parameter in model.named_parameters():
                if only in name and not (only and self.rank > 0):
                    ends = ("word_embeddings.weight", "output_layer.weight")  # tied ones are one tensor on two stages
                    seed = self.moves if name.endswith(ends) else zlib.crc32(f"{self.rank} {self.moves} {name}".encode())
                    parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))

    def plant(self, fault: str | None) -> None:
        self.source.plant(fault)

    def connect(self, servers: list[Server], api_key: str) -> None:
        self.weights.connect(servers, api_key)

    def prepare(self, version: int) -> None:
        self.weights.prepare(version)

    def publish(self, version: int) -> Sent:
        return self.weights.publish(version)

    def canary_logp(self, token_ids: list[int], experts: Experts | None = None) -> list[float]:
        return self.weights.canary_logp(token_ids, experts)

    def close(self) -> None:
        self.weights.close()
        self.trainer_rank.close()


@dataclass
class Ranks:
    """All ranks as the publisher sees them; lives on rank 0, the others `follow`."""

    mine: Rank
    sent: list[Sent] = field(default_factory=list)

    async def connect(self, servers: list[Server], api_key: str) -> None:
        await self.all("connect", servers, api_key)

    async def prepare(self, version: int) -> None:
        await self.all("prepare", version)

    async def publish(self, version: int) -> Sent:
        self.sent.append(functools.reduce(Sent.merge, await self.all("publish", version)))
        return self.sent[-1]

    async def canary_logp(self, token_ids: list[int], experts: Experts | None = None) -> list[float]:
        return join_canary([part for part in await self.all("canary_logp", token_ids, experts) if part], len(token_ids))

    async def all(self, method: str, *args: Any) -> list[Any]:
        """The results of all ranks; raises what one of them raised."""
        return await asyncio.to_thread(self._all, method, args)

    def _all(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        dist.broadcast_object_list([(method, args)], src=0)
        outcomes = _perform(self.mine, method, args)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def end(self) -> None:
        """The others return from `follow`."""
        dist.broadcast_object_list([None], src=0)


def follow(rank: Rank) -> None:
    """Do what rank 0 does, until it ends."""
    while True:
        call: list[Any] = [None]
        dist.broadcast_object_list(call, src=0)
        if call[0] is None:
            return
        _perform(rank, *call[0])


def _perform(rank: Rank, method: str, args: tuple[Any, ...]) -> list[Any]:
    try:
        outcome = getattr(rank, method)(*args)
    except Exception as error:  # noqa: BLE001 - rank 0 raises it; the others must not be left waiting
        outcome = error
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return outcomes
