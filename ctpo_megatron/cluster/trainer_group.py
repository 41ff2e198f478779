"""All ranks of the trainer, as the loop sees them (`loop.protocols.Trainer`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.cluster.calls import Process, call_all


class TrainerGroup:
    """Sends each rank its share and waits for all of them, each call bounded by `timeout_s`."""

    def __init__(self, ranks: list[Process], timeout_s: float) -> None:
        self.ranks = ranks
        self._timeout_s = timeout_s
        self._dp_ranks: list[int] = []

    async def build(self, threads: int, total_steps: int) -> None:
        """Bring up the process group, the model and the optimizer on every rank."""
        first = self.ranks[0]
        (master,) = await call_all([(first, first.actor.address.remote())], self._timeout_s)
        self._dp_ranks = await self._each("build", master, threads, total_steps)

    async def update(self, batches: list[TrainBatch], version: int) -> dict[str, float]:
        """See `loop.protocols.Trainer.update`."""
        shares = self._shares(lambda dp: [batch.micro_batches[dp] for batch in batches])
        return (await self._calls([rank.actor.update.remote(s, version) for rank, s in zip(self.ranks, shares, strict=True)]))[0]

    async def supervise(self, batch: TrainBatch) -> dict[str, float]:
        """See `loop.protocols.Trainer.supervise`."""
        shares = self._shares(batch.micro_batches.__getitem__)
        return (await self._calls([rank.actor.supervise.remote(s) for rank, s in zip(self.ranks, shares, strict=True)]))[0]

    async def connect(self, urls: list[str], api_key: str, engine_tp: int) -> None:
        """Join the update groups of the servers."""
        await self._each("connect", urls, api_key, engine_tp)

    async def publish(self, version: int) -> None:
        """Export on all ranks, send from one."""
        await self._each("publish", version)

    async def save(self, directory: Path, state: dict[str, Any]) -> None:
        """See `loop.protocols.Trainer.save`."""
        await self._each("save", str(directory), state)

    async def load(self, directory: Path) -> dict[str, Any]:
        """See `loop.protocols.Trainer.load`."""
        return (await self._each("load", str(directory)))[0]

    async def save_hf(self, directory: Path) -> None:
        """See `loop.protocols.Trainer.save_hf`."""
        await self._each("save_hf", str(directory))

    async def close(self) -> None:
        """Leave all groups in good order."""
        await self._each("close")

    def _shares(self, of_rank: Any) -> list[ray.ObjectRef]:
        """One object per data-parallel rank, shared by the ranks that work on the same data."""
        stored = {dp: ray.put(of_rank(dp)) for dp in sorted(set(self._dp_ranks))}
        return [stored[dp] for dp in self._dp_ranks]

    async def _each(self, method: str, *args: Any) -> list[Any]:
        return await self._calls([getattr(rank.actor, method).remote(*args) for rank in self.ranks])

    async def _calls(self, refs: list[ray.ObjectRef]) -> list[Any]:
        return await call_all(list(zip(self.ranks, refs, strict=True)), self._timeout_s)
