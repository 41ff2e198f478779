"""The Ray shell around one rank of the trainer: typed calls in, plain numbers out, no branch on the algorithm."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from ctpo_megatron.batch import MicroBatch, Replay
from ctpo_megatron.cluster.logs import redirect_output
from ctpo_megatron.cluster.ray_cluster import node_address
from ctpo_megatron.config import RunConfig
from ctpo_megatron.parallel import RankCoords
from ctpo_megatron.ports import free_port
from ctpo_megatron.record.values import Values
from ctpo_megatron.weights.protocol import Bucket, Sent, Server, WeightSender
from ctpo_megatron.weights.transports.prefetch import begun


class TrainerActor:
    """Rank `rank` of the trainer. Calls are executed one after another, `watch` and `settle` beside them."""

    def __init__(self, config: RunConfig, rank: int, log_path: str) -> None:
        redirect_output(Path(log_path))
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        logging.getLogger("megatron").setLevel(logging.WARNING)  # it lists every parameter at INFO
        self.config = config
        self.rank = rank
        self.sender: WeightSender | None = None
        self._connected = False
        self._prepared: tuple[int, Iterator[Bucket]] | None = None  # a version, and its buckets from the first one on
        self._closed = threading.Event()

    def address(self) -> tuple[str, int]:
        """This node's address and a free port on it, where the ranks will meet."""
        host = node_address(self.config)
        return host, free_port(host)

    def gpus(self) -> list[str]:
        """The GPUs that Ray gave to this rank, by CUDA's names on this node."""
        return ray.get_runtime_context().get_accelerator_ids().get("GPU", [])

    def build(self, master: tuple[str, int], threads: int, total_steps: int) -> RankCoords:
        """Join the process group, build and load the model. Returns where this rank sits."""
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch's, before its first tensor: large pages for buckets of weights
        import torch

        torch.set_num_threads(threads)
        from ctpo_megatron.mcore.hf.buffers import BucketMemory
        from ctpo_megatron.mcore.rank import RankInfo, TrainerRank

        config = self.config
        self.engine = TrainerRank(
            config.model.path,
            config.parallel,
            config.optimizer,
            RankInfo(self.rank, config.parallel.world_size, master[0], master[1]),
            device=config.cluster.device,
            dtype=config.model.dtype,
            seed=config.seed,
            recompute=config.train.recompute,
            total_steps=total_steps,
            moe=config.moe,
        )
        self._buckets = BucketMemory(self.engine.device)
        reference = config.algorithm.reference
        self.reference = None if reference is None else self.engine.host_weights(reference.path)
        self._make_room()
        return self.engine.coords

    def update(self, batches: list[list[MicroBatch]], replays: list[list[Replay | None]], version: int) -> Values:
        """See `loop.protocols.Trainer.update`. `replays`: what this rank's routers see of each micro-batch's record."""
        from ctpo_megatron.mcore.policy import update_policy

        config = self.config
        with_own = [
            [replace(mb, replay=replay) for mb, replay in zip(micro_batches, own, strict=True)]
            for micro_batches, own in zip(batches, replays, strict=True)
        ]
        stats = update_policy(
            self.engine,
            with_own,
            algorithm=config.algorithm,
            temperature=config.rollout.temperature,
            drift=config.drift,
            version=version,
            reference=self.reference,
        )
        self._make_room()
        return stats

    def supervise(self, batch: list[MicroBatch]) -> Values:
        """See `loop.protocols.Trainer.supervise`."""
        from ctpo_megatron.mcore.policy import supervise

        return supervise(self.engine, batch)

    def canary_logp(self, token_ids: list[int]) -> list[float]:
        """See `TrainerGroup.canary_logp`: this rank's part of the padded prompt; empty before the last pipeline stage."""
        from ctpo_megatron.weights.proof.canary import canary_batch

        parallel = self.config.parallel
        batch = canary_batch(token_ids, multiple=2 * parallel.cp * parallel.tp)
        count = parallel.pp if parallel.vpp > 1 else 1  # as interleaving wants it
        logps = self.engine.logp(self.engine.place([batch] * count), temperature=1.0)
        return logps[0].tolist() if logps else []

    def connect(self, servers: list[Server], api_key: str) -> None:
        """Let the sending ranks reach the servers; called again whenever those have changed, and after a failed publication."""
        from ctpo_megatron.engine.layout import EngineLayout
        from ctpo_megatron.weights.proof.expected import Expected
        from ctpo_megatron.weights.transports.choose import make_sender
        from ctpo_megatron.weights.transports.order import open_order

        weights, address, device = self.config.weights, node_address(self.config), self.engine.device
        if not self._connected:
            turns = open_order(self.engine.senders(), address, weights.timeout_s)
            layout = EngineLayout(self.engine.shape, self.config.rollout.engine.tp, cpu=device.type == "cpu")
            self.sender = None if turns is None else make_sender(weights, device, address, turns, lambda: Expected(layout))
            self._connected = True
        if self.sender is not None:
            self.sender.connect(servers, api_key)

    def prepare(self, version: int) -> None:
        """Gather the first bucket of all, in step with the other ranks, before the servers have to wait for it."""
        self._prepared = None  # of a publication that did not come about
        self._prepared = (version, begun(self._stream()))

    def _stream(self) -> Iterator[Bucket]:
        return self.engine.stream(self.config.weights.bucket_mb * 2**20, memory=self._buckets)

    def publish(self, version: int) -> Sent:
        """Export the weights in step with the other ranks; the sending ranks pass them on. Empty on other ranks."""
        prepared, self._prepared = self._prepared, None
        buckets = prepared[1] if prepared and prepared[0] == version else self._stream()
        if self.sender is not None:
            sent = self.sender.send(buckets, version)
        else:
            sent = Sent(version)
            for _ in buckets:
                pass
        if self.engine.device.type != "cpu":  # torch keeps a GPU's memory by itself
            self._buckets.release()
        self._make_room()
        return sent

    def _make_room(self) -> None:
        """Servers on the same GPU are about to start or wake: give it back what torch keeps for later. Nothing on a CPU."""
        if self.config.servers_sleep:
            import torch

            torch.cuda.empty_cache()

    def save(self, directory: str, state: dict[str, Any], background: bool) -> None:
        """See `loop.protocols.Trainer.save`."""
        self.engine.save(Path(directory), state, background=background)

    def settle(self, timeout_s: float) -> None:
        """See `loop.protocols.Trainer.settle`."""
        self.engine.settle(timeout_s)

    def load(self, directory: str) -> dict[str, Any]:
        """See `loop.protocols.Trainer.load`."""
        return self.engine.load(Path(directory))

    def save_hf(self, directory: str) -> None:
        """See `loop.protocols.Trainer.save_hf`."""
        self.engine.save_hf(Path(directory))

    def watch(self) -> None:
        """Returns when the actor is closed; its caller learns at once when the process dies."""
        self._closed.wait()

    def close(self) -> None:
        """Leave all groups."""
        if self.sender is not None:
            self.sender.close()
        if hasattr(self, "engine"):
            self.engine.close()
        self._closed.set()
