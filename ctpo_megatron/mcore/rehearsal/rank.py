"""A trainer rank on fake tensors and fake groups, and one step of it in numbers.

Call it in a process of its own: torch's groups, and megatron's, are the process's. `ctpo plan --rehearse` does.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed import fake_pg

from ctpo_megatron.algorithms import algorithm_recipe
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.mcore.gathering import gather_weights
from ctpo_megatron.mcore.host import megatron_region, prepare_host
from ctpo_megatron.mcore.policy_terms import policy_share
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.mcore.rehearsal.inputs import full_micro_batch
from ctpo_megatron.mcore.rehearsal.ledger import Ledger, Traffic
from ctpo_megatron.models.shape import ModelShape

if TYPE_CHECKING:  # megatron may be imported only after prepare_host
    from ctpo_megatron.mcore.rehearsal.stepper import FakeStepper
    from ctpo_megatron.mcore.step import LossFn

FUSED = (
    (
        "TransformerEngine",
        "megatron's portable layers run, which keep about 1.8 times as much inside a layer; attention keeps what its kernel "
        "does, and gathers keys and values over CP where the kernel passes them around",
    ),
    ("CUDA, NCCL, the allocator", "tensors alone are counted: no contexts, no communicators, no fragments"),
)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What to rehearse: one optimizer step of one rank."""

    shape: ModelShape
    parallel: ParallelConfig
    moe: MoeConfig
    optimizer: OptimizerConfig
    algorithm: AlgorithmConfig
    recompute: str
    dtype: str  # float32 or bfloat16
    tokens: int  # of a micro-batch on one rank
    micro_batches: int
    rank: int
    fused: bool  # attention keeps what TransformerEngine's does, and what was sent is freed; False: as on CPUs


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """Bytes and calls of the step. The first five are what lives at its fullest moment, see `Ledger`."""

    weights: int
    gradients: int
    optimizer: int
    batch: int  # micro-batches of the step, with the routing to follow
    step: int  # activations, gradients of activations, and whatever else forward, backward and update make
    stage: int  # pipeline stage of the rank
    seconds: float
    traffic: tuple[Traffic, ...]
    made_up: tuple[tuple[str, str], ...]  # what was not rehearsed, and what stood in its place

    @property
    def peak(self) -> int:
        """Bytes of all tensors that live at the fullest moment."""
        return self.weights + self.gradients + self.optimizer + self.batch + self.step


def rehearse(what: Rehearsal) -> Rehearsed:
    """Build the rank, let it take one optimizer step, and count."""
    start = time.monotonic()
    prepare_host("cpu")
    from ctpo_megatron.mcore.rehearsal.bridge import HostReads, bridged

    sent = (what.tokens // what.parallel.tp, 1, what.shape.hidden_size)
    reads = HostReads(what.shape.experts.top_k if what.shape.experts else 0)
    ledger, mode = Ledger(), FakeTensorMode(allow_non_fake_inputs=True)
    with bridged(sent), contextlib.ExitStack() as stack:
        with mode, reads, ledger:
            rank = FakeRank(what, ledger)
            stack.callback(rank.close)
            rank.first_update()
        stepper = rank.with_stepper(what.shape.vocab_size, fused=what.fused)
        whole = full_micro_batch(what.tokens * what.parallel.cp, what.shape, what.algorithm, replay=what.moe.routing_replay)
        shards, made = stepper.prepare(rank.place([whole] * what.micro_batches), mode)
        with mode, reads, ledger:
            ledger.label = "batch"
            ledger.note(made)
            del made
            ledger.label = "step"
            ledger.watch()
            rank.train_step(shards, loss_of(what.algorithm), 1.0)
        return _counted(rank, ledger, what, time.monotonic() - start)


def loss_of(algorithm: AlgorithmConfig) -> LossFn:
    """The loss of a training step, as `update_policy` has it; of one that counts log-ratios, which takes most."""
    return partial(policy_share, recipe=algorithm_recipe(algorithm, density=True), algorithm=algorithm)


def _counted(rank: FakeRank, ledger: Ledger, what: Rehearsal, seconds: float) -> Rehearsed:
    from ctpo_megatron.mcore.rehearsal.bridge import BRIDGES

    gradients = rank.gradient_bytes()
    return Rehearsed(
        weights=ledger.peak["model"] - gradients,
        gradients=gradients,
        optimizer=ledger.peak["optimizer"],
        batch=ledger.peak["batch"],
        step=ledger.peak["step"],
        stage=what.rank // (what.parallel.world_size // what.parallel.pp),
        seconds=seconds,
        traffic=tuple(ledger.traffic),
        made_up=tuple((each.name, each.instead) for each in BRIDGES) + (FUSED if what.fused else ()),
    )


class FakeRank(TrainerRank):
    """A `TrainerRank` of a layout whose other ranks are not there, with weights that have no values.

    Build it inside the modes of `rehearse`.
    """

    def __init__(self, what: Rehearsal, ledger: Ledger) -> None:
        self._what, self._ledger = what, ledger
        ledger.label = "model"
        super().__init__(
            "",
            what.parallel,
            what.optimizer,
            RankInfo(what.rank, what.parallel.world_size, "", 0),
            device="cpu",
            dtype=what.dtype,
            seed=1,
            recompute=what.recompute,
            total_steps=2**20,
            moe=what.moe,
            shape=what.shape,
        )

    def _join(self, rank: RankInfo) -> None:
        dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank.rank, world_size=rank.world_size)

    def _load_weights(self) -> None:
        """There are none; what is made from here on is the optimizer's."""
        if self._what.fused:
            from ctpo_megatron.mcore.hf.load import unwrap
            from ctpo_megatron.mcore.rehearsal.flash import use_flash

            use_flash(self.models)
            for model in self.models:  # as mcore.model.transformer sets it on GPUs
                unwrap(model).config.deallocate_pipeline_outputs = self.parallel.pp > 1
        self._ledger.label = "optimizer"

    def first_update(self) -> None:
        """An update without gradients, after which the optimizer has its moments, as in every step but the first."""
        if self.optimizer is None:
            raise RuntimeError("a rehearsed rank has an optimizer")
        models: list[Any] = self.models  # megatron's DistributedDataParallel
        with megatron_region(self.device):
            for model in models:
                model.zero_grad_buffer()
            self.optimizer.step()
            gather_weights(self.models)

    def gradient_bytes(self) -> int:
        """Bytes of megatron's gradient buffers."""
        models: list[Any] = self.models
        buffers = [buffer for model in models for buffer in (*model.buffers, *model.expert_parallel_buffers)]
        return sum(buffer.grad_data.nbytes for buffer in buffers)

    def with_stepper(self, vocab_size: int, *, fused: bool) -> FakeStepper:
        """A stepper for fake micro-batches, which this rank uses from here on."""
        from ctpo_megatron.mcore.rehearsal.stepper import FakeStepper

        self._stepper = stepper = FakeStepper(self._stepper, vocab_size, fused=fused)
        return stepper
