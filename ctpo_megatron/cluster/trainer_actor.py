"""The Ray shell around one rank of the trainer: typed calls in, plain numbers out, no branch on the algorithm."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.cluster.logs import redirect_output
from ctpo_megatron.cluster.ray_cluster import node_address
from ctpo_megatron.config import RunConfig
from ctpo_megatron.ports import free_port


class TrainerActor:
    """Rank `rank` of the trainer. Calls are executed one after another, `watch` beside them."""

    def __init__(self, config: RunConfig, rank: int, log_path: str) -> None:
        redirect_output(Path(log_path))
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        logging.getLogger("megatron").setLevel(logging.WARNING)  # it lists every parameter at INFO
        self.config = config
        self.rank = rank
        self.sender = None
        self._closed = threading.Event()

    def address(self) -> tuple[str, int]:
        """This node's address and a free port on it, where the ranks will meet."""
        host = node_address(self.config)
        return host, free_port(host)

    def build(self, master: tuple[str, int], threads: int, total_steps: int) -> int:
        """Join the process group, build and load the model. Returns the data-parallel rank."""
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)
        from ctpo_megatron.mcore.engine import MegatronEngine, RankInfo

        config = self.config
        self.engine = MegatronEngine(
            config.model.path,
            config.parallel,
            config.optimizer,
            RankInfo(self.rank, config.parallel.world_size, master[0], master[1]),
            device=config.cluster.device,
            dtype=config.model.dtype,
            seed=config.seed,
            recompute=config.train.recompute,
            total_steps=total_steps,
        )
        return self.engine.dp_rank

    def update(self, batches: list[list[MicroBatch]], version: int) -> dict[str, float]:
        """See `loop.protocols.Trainer.update`."""
        from ctpo_megatron.mcore.policy import update_policy

        config = self.config
        return update_policy(
            self.engine,
            batches,
            algorithm=config.algorithm,
            temperature=config.rollout.temperature,
            drift=config.drift,
            version=version,
        )

    def supervise(self, batch: list[MicroBatch]) -> dict[str, float]:
        """See `loop.protocols.Trainer.supervise`."""
        from ctpo_megatron.mcore.policy import supervise

        return supervise(self.engine, batch)

    def connect(self, urls: list[str], api_key: str, engine_tp: int) -> None:
        """Join the servers' update groups; only the sending rank has anything to do."""
        if self.engine.is_sender:
            from ctpo_megatron.weights.broadcast import BroadcastSender

            self.sender = BroadcastSender(self.config.weights, device=self.engine.device, address=node_address(self.config))
            self.sender.connect(urls, api_key, engine_tp)

    def publish(self, version: int) -> None:
        """Export the weights in step with the other ranks; the sending rank passes them on."""
        buckets = self.engine.export(self.config.weights.bucket_mb * 2**20)
        if self.sender is not None:
            self.sender.send(buckets, version)
        else:
            for _ in buckets:
                pass

    def save(self, directory: str, state: dict[str, Any]) -> None:
        """See `loop.protocols.Trainer.save`."""
        self.engine.save(Path(directory), state)

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
