"""A trainer of several ranks with faults to plant, driven from its rank 0, where the publisher runs in `test_publication`."""

from __future__ import annotations

import asyncio
import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.cluster.trainer.actor import TrainerActor
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.weights import Transport
from ctpo_megatron.mcore.rank import RankInfo
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.weights.proof.canary import join_canary
from ctpo_megatron.weights.protocol import Bucket, Sent, Server

BUCKET_BYTES = 200_000  # several buckets for each sender
EXPERT = "model.layers.1.mlp.experts.2."
Wire = Callable[[Bucket, int], Bucket]


def run_config(model: Path, root: Path, timeout_s: float) -> RunConfig:
    """Of a trainer of two pipeline stages."""
    return RunConfig.model_validate(
        {
            "name": "publication",
            "run_dir": str(root),
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": "none.jsonl"},
            "parallel": {"pp": 2},
            "weights": {"type": "broadcast", "timeout_s": timeout_s},
            "cluster": {"device": "cpu"},
        }
    )


class Rank(TrainerActor):
    """The trainer's own rank, whose weights move without training, and whose wire may be tampered with once."""

    def __init__(self, config: RunConfig, info: RankInfo) -> None:
        log = Path(config.run_dir) / f"rank_{info.rank}.log"
        super().__init__(config, read_hf_config(config.model.path), info.rank, str(log))
        self.build((info.master_addr, info.master_port), 1, 1)
        self.moves = 0
        self.before: dict[str, Tensor] = {}  # of the last publication
        self.now: dict[str, Tensor] = {}
        self.fault: str | None = None
        self.strike: Callable[[], None] = lambda: None

    def use(self, weights: Transport) -> None:
        """Another transport, from the next connection on."""
        if self.sender is not None:
            self.sender.close()
        self.config = self.config.model_copy(update={"weights": weights})
        self.sender, self._connected = None, False

    @torch.no_grad()
    def move(self, only: str = "") -> None:
        """Other weights, as after a step; or only those of parameters called `only` on the first stage."""
        self.moves += 1
        for model in self.engine.models:
            for name, parameter in model.named_parameters():
                if only in name and not (only and self.rank > 0):
                    ends = ("word_embeddings.weight", "output_layer.weight")  # tied ones are one tensor on two stages
                    seed = self.moves if name.endswith(ends) else zlib.crc32(f"{self.rank} {self.moves} {name}".encode())
                    parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))

    def plant(self, fault: str | None) -> None:
        """What goes wrong in the next publication, before its digests (`cached`) or after them."""
        self.fault = fault

    def publish(self, version: int) -> Sent:
        """See `TrainerActor.publish`; small buckets, and the planted fault."""
        fault, self.fault = self.fault, None
        (prepared, stream), self._prepared = self._prepared, None
        assert prepared == version
        start = getattr(type(self.sender), "_start", None)  # of a bucket on its way; there is no such thing on disks
        wire = {"dropped": self._drop, "swapped": self._swap, "stale": self._stale, "struck": self._strike}.get(fault or "")
        if start is not None:
            self.sender._start = functools.partial(start, self.sender) if wire is None else self._tampered(start, wire)
        self.before, self.now = self.now, {}
        return self.sender.send(self._noted(stream, cached=fault == "cached"), version)

    def _stream(self) -> Iterator[Bucket]:
        return self.engine.stream(BUCKET_BYTES)

    def _noted(self, stream: Iterator[Bucket], *, cached: bool) -> Iterator[Bucket]:
        for bucket in stream:
            self.now |= {name: tensor.clone() for name, tensor in bucket}
            yield [(name, self.before[name]) for name, _ in bucket] if cached else bucket

    def _tampered(self, start: Callable[..., Any], wire: Wire) -> Callable[..., Any]:
        def tampered(bucket: Bucket, number: int, deadline: float) -> Callable[[], None]:
            bucket = wire(bucket, number)
            return start(self.sender, bucket, number, deadline) if bucket else lambda: None

        return tampered

    def _drop(self, bucket: Bucket, number: int) -> Bucket:
        return [] if (self.rank, number) == (0, 1) else bucket

    def _swap(self, bucket: Bucket, _number: int) -> Bucket:
        tensors = dict(bucket)
        for one in [name for name in tensors if name.endswith("input_layernorm.weight")]:
            other = one.replace("input", "post_attention")
            tensors[one], tensors[other] = tensors[other], tensors[one]
        return list(tensors.items())

    def _stale(self, bucket: Bucket, _number: int) -> Bucket:
        return [(name, self.before[name] if name.startswith(EXPERT) else tensor) for name, tensor in bucket]

    def _strike(self, bucket: Bucket, number: int) -> Bucket:
        if (self.rank, number) == (0, 1):
            self.strike()
        return bucket


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

    async def canary_logp(self, token_ids: list[int]) -> list[float]:
        return join_canary([part for part in await self.all("canary_logp", token_ids) if part], len(token_ids))

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
