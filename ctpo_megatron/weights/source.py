"""One trainer rank's part in publications: reaching servers, gathering weights with the other ranks, sending."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.weights import ColocatedTransport, Transport
from ctpo_megatron.engine.answers import Experts
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.mcore.hf.buffers import BucketMemory
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.weights.proof.canary import canary_batch
from ctpo_megatron.weights.proof.expected import ExpectedDigests
from ctpo_megatron.weights.protocol import Bucket, Sent, Server, WeightSender
from ctpo_megatron.weights.quantised import Quantiser
from ctpo_megatron.weights.tracking import Tracked
from ctpo_megatron.weights.transports.choose import make_sender
from ctpo_megatron.weights.transports.order import open_order
from ctpo_megatron.weights.transports.prefetch import DigestAccount, prefetched


class StreamsWeights(Protocol):
    """The part of `mcore.rank.TrainerRank` that a publication needs. All methods are collective."""

    @property
    def shape(self) -> ModelShape:
        """The model."""
        ...

    @property
    def parallel(self) -> ParallelConfig:
        """The layout of the trainer's ranks."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this rank's weights lie."""
        ...

    @property
    def token_multiple(self) -> int:
        """What each rank's share of the tokens of a micro-batch has to be a multiple of."""
        ...

    def senders(self, *, per_stage: bool) -> list[int]:
        """The ranks that `stream` gives weights to, in their order: one for each pipeline stage, or for each place of experts."""
        ...

    def stream(
        self, bucket_bytes: int, *, per_stage: bool, memory: BucketMemory | None, only: Collection[str] | None
    ) -> Iterator[Bucket]:
        """Full weights in buckets, each on the rank that sends it; empty buckets where this rank gives pieces away.

        `only`: the keys of the parameters that are wanted, None for all.
        """
        ...

    def pieces(self) -> Mapping[str, Tensor]:
        """This rank's parts of the parameters, by their keys."""
        ...

    def place(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """This rank's shards of micro-batches."""
        ...

    def logp(self, micro_batches: list[MicroBatch], temperature: float) -> list[Tensor]:
        """Log-probs of the labels of each placed shard; an empty list before the last pipeline stage."""
        ...


class RankWeights:
    """The weights of one trainer rank on their way to the servers. All ranks call its methods in the same order.

    `transport` is the section of the configuration; `tp` the tensor-parallel size of each server; `address` this node's, for the
    servers and the other ranks to reach. `memory` holds buckets from one publication to the next. `new_account` makes the account
    of one publication's digests.
    """

    def __init__(
        self,
        rank: StreamsWeights,
        transport: Transport,
        *,
        tp: int,
        address: str,
        memory: BucketMemory | None = None,
        new_account: Callable[[EngineLayout], DigestAccount] = ExpectedDigests,
    ) -> None:
        self._rank = rank
        self._transport = transport
        self._tp = tp
        self._address = address
        shared = isinstance(transport, ColocatedTransport)  # servers map buckets by name, so ranks of the host can as well
        self._memory = memory or BucketMemory(rank.device, shared=shared)
        self._new_account = new_account
        self._quantiser = Quantiser(rank.shape, BucketMemory(rank.device, shared=shared)) if transport.quantization else None
        self._sender: WeightSender | None = None  # of a rank that sends
        self._ordered = False  # whether the senders have found their order
        self._tracked = Tracked() if transport.delta else None
        self._partial = False  # whether the stream that was made last brings only what has changed
        self._prepared: tuple[int, Iterator[Bucket]] | None = None  # a version, and its buckets from the first one on

    def connect(self, servers: list[Server], api_key: str) -> None:
        """Let the sending ranks reach `servers`, and no others; called again after a failed publication.

        Raises WeightSyncError, naming the servers that did not come.
        """
        if self._tracked is not None:
            self._tracked.forget()
            if self._partial:  # what was prepared for servers that hold the version before
                self._prepared = None
        if not self._ordered:
            self._sender = self._make_sender()
            self._ordered = True
        if self._sender is not None:
            self._sender.connect(servers, api_key)

    def _make_sender(self) -> WeightSender | None:
        """This rank's sender; None where it sends nothing."""
        device, transport = self._rank.device, self._transport
        senders = self._rank.senders(per_stage=transport.sends_per_stage)
        order = open_order(senders, self._address, transport.timeout_s)
        layout = EngineLayout(self._rank.shape, self._tp, cpu=device.type == "cpu", quantised=self._quantiser is not None)
        if order is None:
            return None
        return make_sender(transport, device, self._address, order, lambda: self._new_account(layout))

    def prepare(self, version: int) -> None:
        """Find what has changed, and gather the first bucket of all, before the servers have to wait for it."""
        self._prepared = None  # of a publication that did not come about
        self._prepared = (version, prefetched(self._stream()))

    def publish(self, version: int) -> Sent:
        """What this rank sent of `version`; nothing on ranks that send nothing. Raises WeightSyncError; then connect again."""
        prepared, self._prepared = self._prepared, None
        buckets = prepared[1] if prepared and prepared[0] == version else self._stream()
        tracked = self._tracked
        try:
            sent = self._send(buckets, version)
        except BaseException:
            if tracked is not None:
                tracked.forget()  # so all ranks send all of it
            raise
        if tracked is not None:
            tracked.commit()
        return sent

    def _send(self, buckets: Iterator[Bucket], version: int) -> Sent:
        if self._sender is not None:
            return self._sender.send(buckets, version)
        for _ in buckets:
            pass
        return Sent(version)

    def canary_logp(self, token_ids: list[int], experts: Experts | None = None) -> list[float]:
        """Log-probs of this rank's part of the padded prompt, at temperature 1; empty before the last pipeline stage.

        `experts`: those that the prompt's tokens are to go to, of the whole model; None: the routers choose.
        `proof.canary.join_canary` joins the parts of the context-parallel ranks.
        """
        parallel = self._rank.parallel
        batch = canary_batch(token_ids, math.lcm(2, self._rank.token_multiple) * parallel.cp * parallel.tp, experts)
        count = parallel.pp if parallel.vpp > 1 else 1  # as interleaving wants it
        logps = self._rank.logp(self._rank.place([batch] * count), temperature=1.0)
        return logps[0].tolist() if logps else []

    def close(self) -> None:
        """Leave the servers. Safe to call twice."""
        if self._sender is not None:
            self._sender.close()

    def _stream(self) -> Iterator[Bucket]:
        transport = self._transport
        only = None if self._tracked is None else self._tracked.look(self._rank.pieces())
        self._partial = only is not None
        size = transport.bucket_mb * 2**20
        stream = self._rank.stream(size, per_stage=transport.sends_per_stage, memory=self._memory, only=only)
        return stream if self._quantiser is None else self._quantiser.stream(stream)
