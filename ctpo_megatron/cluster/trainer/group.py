"""All ranks of the trainer, as the loop sees them (`loop.protocols.Trainer`)."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from ctpo_megatron.batch import Abandoned, MicroBatch, Replay, TrainBatch, UpdateAbandoned
from ctpo_megatron.cluster.calls import Process, call_all
from ctpo_megatron.cluster.keepers.calls import Handed
from ctpo_megatron.cluster.resources import SHOWN
from ctpo_megatron.cluster.trainer.abandoned import join_abandoned
from ctpo_megatron.cluster.trainer.actor import WAITS
from ctpo_megatron.cluster.trainer.kept_tokens import join_tokens
from ctpo_megatron.cluster.trainer.tracing import RankTrace
from ctpo_megatron.engine.answers import Experts
from ctpo_megatron.errors import TrainerLost
from ctpo_megatron.parallel import RankCoords
from ctpo_megatron.record.token_files import TokenRecord
from ctpo_megatron.record.values import Values
from ctpo_megatron.weights.proof.canary import join_canary
from ctpo_megatron.weights.protocol import Sent, Server


class TrainerGroup:
    """Sends each rank its share and waits for all of them, each call bounded by `timeout_s`."""

    def __init__(self, ranks: list[Process], timeout_s: float) -> None:
        self.ranks = ranks
        self._timeout_s = timeout_s
        self._coords: list[RankCoords] = []

    async def build(self, ranks_here: Sequence[int], total_steps: int) -> None:
        """Bring up the process group, the model and the optimizer on every rank.

        `ranks_here`: for each rank, how many are on its node.
        """
        first = self.ranks[0]
        (master,) = await call_all([(first, first.actor.address.remote())], self._timeout_s, TrainerLost)
        prefix = secrets.token_hex(16)  # a new one for each group of processes, known to them alone
        sent = zip(self.ranks, ranks_here, strict=True)
        self._coords = await self._calls([rank.actor.build.remote(master, prefix, here, total_steps) for rank, here in sent])

    async def gpus(self) -> list[list[str]]:
        """The GPUs of each rank, by CUDA's names on its node."""
        return await self._each("gpus")

    async def update(self, batches: list[TrainBatch], version: int) -> Values:
        """The reduced statistics of one optimizer step per batch (`loop.protocols.Trainer.update`)."""
        shares = self._shares(lambda dp: [[without_replay(mb) for mb in batch.micro_batches[dp]] for batch in batches])
        own = [[replay_at(coords, batch.micro_batches[coords.dp_rank]) for batch in batches] for coords in self._coords]
        sent = zip(self.ranks, shares, own, strict=True)
        found = await self._calls([rank.actor.update.remote(share, mine, version) for rank, share, mine in sent])
        return self._values(found, batches)

    async def tokens(self, batches: list[TrainBatch]) -> TokenRecord | None:
        """What the update on `batches`, the last one, made of each token that the policy wrote; None where that is not kept."""
        return join_tokens(await self._each("tokens"), self._coords, batches)

    async def supervise(self, batch: TrainBatch) -> Values:
        """The reduced statistics of one supervised step (`loop.protocols.Trainer.supervise`)."""
        shares = self._shares(batch.micro_batches.__getitem__)
        found = await self._calls([rank.actor.supervise.remote(s) for rank, s in zip(self.ranks, shares, strict=True)])
        return self._values(found, [batch])

    async def assess(self, batch: TrainBatch) -> Values:
        """The reduced statistics of one batch (`loop.protocols.Trainer.assess`)."""
        shares = self._shares(batch.micro_batches.__getitem__)
        found = await self._calls([rank.actor.assess.remote(s) for rank, s in zip(self.ranks, shares, strict=True)])
        return found[0]

    async def canary_logp(self, token_ids: list[int], experts: Experts | None = None) -> list[float]:
        """Log-probs of tokens 1, 2, ... of the prompt at temperature 1, with the weights as they are.

        `experts`: those that its tokens are to go to, see `RankWeights.canary_logp`.
        """
        parts = await self._each("canary_logp", token_ids, experts)
        shards = {coords.cp_rank: part for coords, part in zip(self._coords, parts, strict=True) if part}
        return join_canary([shards[rank] for rank in sorted(shards)], len(token_ids))

    async def connect(self, servers: list[Server], api_key: str) -> None:
        """Let the sending ranks reach the servers, in place of those of an earlier call. Raises WeightSyncError."""
        await self._each("connect", servers, api_key)

    async def prepare(self, version: int) -> None:
        """Gather what `publish` of this version sends first."""
        await self._each("prepare", version)

    async def publish(self, version: int) -> Sent:
        """Send from all sending ranks; what they sent together. Raises WeightSyncError, then `connect` again first."""
        return functools.reduce(Sent.merge, await self._each("publish", version))

    async def save(self, directory: Path, *, background: bool) -> None:
        """Each rank saves its part of a checkpoint (`loop.protocols.Trainer.save`)."""
        await self._each("save", str(directory), background)

    async def save_weights(self, directory: Path) -> None:
        """The ranks save their weights alone together (`loop.protocols.Trainer.save_weights`)."""
        await self._each("save_weights", str(directory))

    async def settle(self) -> None:
        """Wait for the save in flight, beside the other calls (`loop.protocols.Trainer.settle`)."""
        settle = [rank.actor.settle.options(concurrency_group="checkpoint") for rank in self.ranks]
        await self._calls([each.remote(self._timeout_s) for each in settle])

    async def load(self, directory: Path) -> None:
        """All ranks go on from a checkpoint (`loop.protocols.Trainer.load`)."""
        await self._each("load", str(directory))

    async def copy(self) -> list[str]:
        """The ranks copy their state to host memory, for `hand_over`. Returns the node of each."""
        return await self._each("copy")

    async def hand_over(self, step: int, keepers: Sequence[Any], stays: int | None, timeout_s: float) -> list[Handed]:
        """The ranks send what they have copied, each to its keeper, beside the other calls: `keepers.calls.hand_over`."""
        sent = zip(self.ranks, keepers, strict=True)
        calls = [(rank, rank.actor.hand_over.options(concurrency_group="memory"), keeper) for rank, keeper in sent]
        return await call_all([(rank, call.remote(step, keeper, stays)) for rank, call, keeper in calls], timeout_s)

    async def recall(self, step: int, keepers: Sequence[Any], digests: Sequence[str]) -> None:
        """All ranks go on from what `keepers` hold: `TrainerRank.recall`. Raises CopyLost, and nothing has changed then."""
        sent = zip(self.ranks, digests, strict=True)
        await self._calls([rank.actor.recall.remote(step, list(keepers), digest) for rank, digest in sent])

    async def save_hf(self, directory: Path) -> None:
        """The ranks write the model in Hugging Face format together (`loop.protocols.Trainer.save_hf`)."""
        await self._each("save_hf", str(directory))

    async def begin_trace(self, profiles: Mapping[int, Path], memories: Mapping[int, Path]) -> None:
        """Let all ranks trace what they do. The files that some are to write besides, by rank."""
        paths = [[str(of[rank]) if rank in of else None for of in (profiles, memories)] for rank in range(len(self.ranks))]
        await self._calls([rank.actor.begin_trace.remote(*own) for rank, own in zip(self.ranks, paths, strict=True)])

    async def end_trace(self) -> list[RankTrace]:
        """End the trace; returns what each rank gathered."""
        return await self._each("end_trace")

    def drop_trace(self) -> None:
        """End the trace and wait for nobody: some rank may be gone."""
        for rank in self.ranks:
            rank.actor.end_trace.remote()

    def _values(self, found: list[Values | Abandoned], batches: list[TrainBatch]) -> Values:
        """What all ranks found alike. Raises UpdateAbandoned with the parts of all of them."""
        abandoned = [each for each in found if isinstance(each, Abandoned)]
        if abandoned:
            raise UpdateAbandoned(join_abandoned(abandoned, self._coords, batches))
        known = [each for each in found if not isinstance(each, Abandoned)]
        own = {name: each[name] for rank, each in enumerate(known[:SHOWN]) if (name := f"{WAITS}{rank}") in each}
        return {name: value for name, value in known[0].items() if not name.startswith(WAITS)} | own

    def _shares(self, of_rank: Any) -> list[ray.ObjectRef]:
        """One object per data-parallel rank, shared by the ranks that work on the same data."""
        stored = {dp: ray.put(of_rank(dp)) for dp in sorted({coords.dp_rank for coords in self._coords})}
        return [stored[coords.dp_rank] for coords in self._coords]

    async def _each(self, method: str, *args: Any) -> list[Any]:
        return await self._calls([getattr(rank.actor, method).remote(*args) for rank in self.ranks])

    async def _calls(self, refs: list[ray.ObjectRef]) -> list[Any]:
        return await call_all(list(zip(self.ranks, refs, strict=True)), self._timeout_s, TrainerLost)


def without_replay(mb: MicroBatch) -> MicroBatch:
    """A micro-batch as the ranks of a replica receive it: without the record of routing, of which each rank gets its own part."""
    return replace(mb, replay=None)


def replay_at(coords: RankCoords, micro_batches: list[MicroBatch]) -> list[Replay | None]:
    """What the routers of one rank see of each micro-batch's record of routing; None where it has none."""
    return [None if mb.replay is None else mb.replay.for_rank(coords, mb.sequences.cu_seqlens) for mb in micro_batches]
