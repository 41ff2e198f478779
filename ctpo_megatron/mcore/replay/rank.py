"""One rank of a replay: the weights of a checkpoint, one forward and backward pass over the dumped batch, and what was seen."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ctpo_megatron.algorithms import Scan, Stats, algorithm_recipe
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.checkpoints.files import MODEL
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.mcore.host import megatron_region, prepare_host
from ctpo_megatron.mcore.old_policy import anchor_logp
from ctpo_megatron.mcore.policy_terms import likelihood_loss, policy_terms
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.mcore.replay.findings import RankFindings
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.record.values import scalar


@dataclass(frozen=True, slots=True)
class Replayed:
    """What to run again: a dumped batch, packed for the layout, and all that its loss and its model are made of."""

    checkpoint: str
    shape: ModelShape
    dtype: str  # number format of the weights: as they were saved, or float32
    device: str
    parallel: ParallelConfig
    moe: MoeConfig
    algorithm: AlgorithmConfig  # without what the dump has no log-probs for
    temperature: float
    policy_version: int
    supervised: bool
    micro_batches: list[list[MicroBatch]]  # [dp][n], whole


def replay_on_rank(rank: RankInfo, what: Replayed) -> RankFindings:
    """What this rank saw; every rank of the layout calls it, in a process of its own."""
    begun = time.monotonic()
    prepare_host(what.device, rank.rank)
    engine = DumpRank(what, replace(rank, local_rank=rank.rank))
    try:
        return engine.run(begun)
    finally:
        engine.close()


class DumpRank(TrainerRank):
    """A trainer rank whose weights come from a checkpoint. It takes no optimizer step; its optimizer only finds the norm."""

    def __init__(self, what: Replayed, rank: RankInfo) -> None:
        self._what = what
        super().__init__(
            str(Path(what.checkpoint) / MODEL),
            what.parallel,
            OptimizerConfig(),
            rank,
            device=what.device,
            dtype=what.dtype,
            seed=0,
            moe=what.moe,
            shape=what.shape,
        )

    def _load_weights(self) -> None:
        from ctpo_megatron.mcore.checkpoint.checkpoint import Trained, load_checkpoint

        load_checkpoint(self._what.checkpoint, Trained(self.models, None, None, self.model_path))

    def run(self, begun: float) -> RankFindings:
        """Forward and backward over this rank's part of the batch; see `replay_on_rank`."""
        with megatron_region(self.device):
            return self._run(begun)

    def _run(self, begun: float) -> RankFindings:
        from ctpo_megatron.mcore.replay.probe import Probe
        from ctpo_megatron.mcore.replay.tensors import gradients_seen, weights_seen
        from ctpo_megatron.mcore.replay.terms import LossTerms

        what, coords = self._what, self.coords
        shards = self._anchored(self.place(what.micro_batches[coords.dp_rank]))
        probe = Probe(self.models, self.shape, coords, self.rank.rank, shards)
        terms = LossTerms(scale=what.parallel.dp * what.parallel.cp)
        weights = weights_seen(self.models, self.shape, self.rank.rank)

        def loss(logp: Tensor, shard: MicroBatch, scan: Scan) -> tuple[Tensor, Stats]:
            probe.log_probs(logp)
            share, token_loss = self._loss(logp, shard, scan)
            terms.take(shard, probe.rows(shard), logp, token_loss, scan)
            return share, Stats()

        with probe.watch():
            values = self._stepper.forward_backward(shards, loss, what.temperature)
        gradients = gradients_seen(self.models, self.shape, self.rank.rank)
        told = coords.tp_rank == 0  # its peers have the same log-probs
        return RankFindings(
            loss=scalar(values["loss"]),
            grad_norm=self._grad_norm(),
            forward=probe.forward,
            backward=probe.backward,
            weights=weights,
            gradients=gradients,
            tokens=terms.tokens() if told else [],
            bad_tokens=terms.bad_tokens() if told else 0,
            seconds=time.monotonic() - begun,
        )

    def _anchored(self, shards: list[MicroBatch]) -> list[MicroBatch]:
        """The shards with anchors: those of the dump, or, where it has none, the log-probs of these very weights."""
        what = self._what
        if what.supervised or shards[0].tokens.anchor_logp is not None:
            return shards
        old = self.logp(shards, what.temperature)
        if not old:
            return shards
        found = [anchor_logp(mb, logp, what.algorithm.anchor, what.policy_version) for mb, logp in zip(shards, old, strict=True)]
        return [mb.with_streams(anchor_logp=each) for mb, each in zip(shards, found, strict=True)]

    def _loss(self, logp: Tensor, shard: MicroBatch, scan: Scan) -> tuple[Tensor, Tensor]:
        """This rank's share of the loss, and the loss of each token before it is weighted, what is added to the objective
        included."""
        what = self._what
        if what.supervised:
            out = likelihood_loss(logp, shard, scan)
            return out.loss, out.token_loss
        out = policy_terms(logp, shard, scan, recipe=algorithm_recipe(what.algorithm), algorithm=what.algorithm)
        return out.loss, out.token_loss

    def _grad_norm(self) -> float:
        if self.optimizer is None:
            raise RuntimeError("a replay without an optimizer has no gradient norm")
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())
