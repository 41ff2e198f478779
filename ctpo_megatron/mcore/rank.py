"""One rank of the trainer: model, optimizer and schedule of a Megatron-Core process, without Ray.

Every method is collective: all ranks of the trainer call it in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.algorithms import Scan, Stats, raise_if_nonfinite
from ctpo_megatron.algorithms.statistics import NONFINITE
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.config.critic import CriticConfig
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.config.train import Fp8Config, OptimizerConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.mcore.gathering import gather_weights
from ctpo_megatron.mcore.hf.buffers import BucketMemory, NamedTensors
from ctpo_megatron.mcore.host import dtype_on, megatron_region, prepare_host
from ctpo_megatron.mcore.host_weights import HostWeights
from ctpo_megatron.mcore.meeting import TIMEOUT_MINUTES, RankInfo, meet
from ctpo_megatron.mcore.reference import BaseModel, Reference
from ctpo_megatron.mcore.transformer_engine import use_transformer_engine
from ctpo_megatron.models.adapters import check_adapter
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.models.rules import check_layout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import EXPERT_BIAS, VALUE_HEAD, hf_tensors
from ctpo_megatron.record.values import Values, scalar

if TYPE_CHECKING:  # megatron may be imported only after prepare_host
    from ctpo_megatron.mcore.checkpoint.checkpoint import Trained
    from ctpo_megatron.mcore.checkpoint.part import Contents, Part
    from ctpo_megatron.mcore.checkpoint.recall import Read
    from ctpo_megatron.mcore.step import LossFn

Check = Callable[[Values], None]
"""Takes the reduced statistics of a pass, of which it may take away some. Raises MismatchError, on every rank alike."""
CLOSE_TIMEOUT_S = 20.0  # for a save that was not waited for


class TrainerRank:
    """Model, optimizer and schedule of one rank. `optimizer=None` builds a model that only computes log-probs.

    `shape`: of the model in `model_path`, where the caller has read it already.
    """

    def __init__(
        self,
        model_path: str,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig | None,
        rank: RankInfo,
        *,
        device: str = "auto",
        dtype: str = "auto",
        seed: int,
        recompute: str = "none",
        total_steps: int | None = None,
        moe: MoeConfig | None = None,
        shape: ModelShape | None = None,
        adapter: LoraConfig | None = None,
        critic: CriticConfig | None = None,
        fp8: Fp8Config | None = None,
    ) -> None:
        self.shape = shape or read_hf_config(model_path)
        check_layout(self.shape, parallel, adapted=adapter is not None)
        if adapter is not None:
            check_adapter(self.shape, adapter, moe or MoeConfig())
        if parallel.world_size != rank.world_size:
            raise ConfigError(f"parallel.tp * pp * cp * dp = {parallel.world_size}, but the trainer has {rank.world_size} ranks.")
        self.device = prepare_host(device, rank.local_rank)
        self.model_path, self.rank, self.parallel = model_path, rank, parallel
        self.adapter, self.critic, self._fp8 = adapter, critic, fp8
        self._join(rank)
        with megatron_region(self.device):
            self._build(optimizer, dtype_on(self.device, dtype), seed, total_steps, moe=moe, recompute=recompute, fp8=fp8)

    def _build(self, optimizer: OptimizerConfig | None, dtype: torch.dtype, seed: int, steps: int | None, **options: Any) -> None:
        from ctpo_megatron.mcore import groups, step
        from ctpo_megatron.mcore.checkpoint.background import BackgroundSave
        from ctpo_megatron.mcore.model.build import build_model
        from ctpo_megatron.mcore.model.routing import Routers
        from ctpo_megatron.mcore.optimizer import build_optimizer, build_schedule, check_optimizer

        if optimizer is not None:
            check_optimizer(optimizer, self.device, dtype)
        groups.init_parallel_groups(self.parallel, seed, TIMEOUT_MINUTES)
        self.models = build_model(
            self.shape,
            self.parallel,
            dtype,
            self.device,
            **options,
            trainable=optimizer is not None,
            adapter=self.adapter,
            critic=self.critic,
        )
        self._load_weights()
        self._begin_adapters(seed)
        self.optimizer = self.schedule = self._saver = None
        if optimizer is not None:
            self.optimizer = build_optimizer(self.models, optimizer, dtype, self.critic)
            self.schedule = build_schedule(self.optimizer, optimizer, steps)
            self._saver, self._moved = BackgroundSave(TIMEOUT_MINUTES), False
        portable = not use_transformer_engine(self.device)
        routers = Routers(self.models, self.shape, self.device)
        self._stepper = step.Stepper(self.models, routers, self.shape.vocab_size, self.device, portable)

    def _join(self, rank: RankInfo) -> None:
        """Meet the other ranks. A rehearsal (`mcore.rehearsal`) has none, and no weights either."""
        meet(rank, self.device)

    def _load_weights(self) -> None:
        from ctpo_megatron.mcore.hf.load import load_hf

        load_hf(self.models, self.shape, self.model_path)

    def _begin_adapters(self, seed: int) -> None:
        from ctpo_megatron.mcore.checkpoint.trainables import adapter_words
        from ctpo_megatron.mcore.hf.adapters import draw_adapters
        from ctpo_megatron.mcore.hf.peft import load_peft

        self._words: dict[str, Any] | None = None if self.critic is None else {VALUE_HEAD: True}
        if self.adapter is None:
            return
        self._words = adapter_words(self.adapter, self.model_path)
        if self.adapter.path is None:
            draw_adapters(self.models, seed)
        else:
            load_peft(self.models, self.shape, self.adapter, self.adapter.path)

    @property
    def coords(self) -> RankCoords:
        """This rank's place among the others."""
        return self._stepper.coords

    @property
    def token_multiple(self) -> int:
        """What this rank's share of the tokens of a micro-batch has to be a multiple of."""
        return 1 if self._fp8 is None else self._fp8.token_multiple

    def senders(self, *, per_stage: bool = False) -> list[int]:
        """Ranks that `stream` gives weights to, in the order in which their tensors come."""
        from ctpo_megatron.mcore.hf.stream import find_holders

        return list(find_holders(self.models, self.shape).shares(hf_tensors(self.shape), per_stage=per_stage))

    @property
    def scan(self) -> Scan:
        """How prefix sums run over this rank's shards."""
        return self._stepper.scan

    def shard(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """This rank's context-parallel shards of whole micro-batches, still where these are: in the host's memory."""
        return self._stepper.shard(micro_batches)

    def on_device(self, shards: list[MicroBatch]) -> list[MicroBatch]:
        """What `shard` made, on this rank's device; all other methods take these."""
        return self._stepper.on_device(shards)

    def place(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """This rank's shards of whole micro-batches, on its device."""
        return self.on_device(self.shard(micro_batches))

    def reduce(self, stats: list[Stats]) -> Values:
        """Statistics over micro-batches and ranks, the same on every rank.

        `stats` counts only where it comes from: the last pipeline stage.
        """
        return self._stepper.reduce(stats)

    def waited_s(self) -> float:
        """Seconds since it was asked last for which this rank waited for others in passes: see `mcore.waits`."""
        return self._stepper.waits.taken()

    def logp(self, micro_batches: list[MicroBatch], temperature: float) -> list[Tensor]:
        """Log-probs of the labels of each placed shard, [T / cp] float32; an empty list before the last pipeline stage."""
        with megatron_region(self.device):
            return self._stepper.logp(micro_batches, temperature)

    def logp_and_values(self, micro_batches: list[MicroBatch], temperature: float) -> list[tuple[Tensor, Tensor | None]]:
        """The same with the values that a rank built with a critic finds; None without one."""
        with megatron_region(self.device):
            return self._stepper.logp_and_values(micro_batches, temperature)

    def reference(self, model_path: str | None = None) -> Reference:
        """The policy of the model in `model_path` for `using`; None: the one that training began with.

        With adapters that is the model without them, which takes no memory.
        """
        if self.adapter is None:
            return self.host_weights(model_path)
        return BaseModel(None if model_path in (None, self.model_path) else self.host_weights(model_path))

    def host_weights(self, model_path: str | None = None) -> HostWeights:
        """This rank's weights as they are, or those of another directory, copied to host memory for `using`.

        Raises ConfigError where that model has another shape.
        """
        from ctpo_megatron.mcore.hf.load import load_hf

        if model_path is not None and replace(read_hf_config(model_path), dtype=self.shape.dtype) != self.shape:
            raise ConfigError(f"{model_path} has another shape than {self.model_path}; what takes its place needs the same.")
        with megatron_region(self.device):
            taken = HostWeights.take(self.models)
            if model_path is not None:  # loaded in the model's place, then exchanged
                load_hf(self.models, self.shape, model_path)
                taken.exchange(self.models)
        return taken

    def using(self, reference: Reference) -> AbstractContextManager[None]:
        """A context in which the model is that policy; afterwards it is its own again, bit for bit. Only for `logp`."""
        return reference.in_place_of(self.models)

    def train_step(
        self,
        micro_batches: list[MicroBatch],
        loss_fn: LossFn,
        temperature: float,
        check: Check | None = None,
        *,
        warming_up: bool = False,
        more: bool = False,
    ) -> Values:
        """One optimizer step on placed shards; see `step.LossFn`. `check` is asked before anything is changed.

        Returns loss, grad_norm (before clipping; also as grad_norm_max), lr and the reduced statistics, the same on every rank;
        of a value head critic/grad_norm and critic/lr besides. `warming_up`: no weight but its own moves. `more`: another step
        follows, whose forward pass makes the weights whole; until then nobody may read them.
        Raises NonFiniteError on every rank when the loss or the gradient is not finite, and what `check` raises. Weights, moments
        and schedule are then as they were, bit for bit, and so are random states: nothing here draws.
        """
        if self.optimizer is None or self.schedule is None:
            raise ConfigError("train_step on a trainer rank that was built without an optimizer.")
        from ctpo_megatron.mcore.optimizer_step import require_finite

        with megatron_region(self.device), self._unmoved_unless_applied(warming_up):
            values = self._stepper.forward_backward(micro_batches, loss_fn, temperature)
            raise_if_nonfinite(values)
            values.pop(NONFINITE, None)
            if check is not None:
                check(values)
            require_finite("loss", scalar(values["loss"]))
            values |= self._optimizer_step(self.optimizer, self.schedule, warming_up)
            gather_weights([] if more else self.models)
            return values

    @contextlib.contextmanager
    def _unmoved_unless_applied(self, warming_up: bool) -> Iterator[None]:
        """Inside it, an error of the step leaves the routers' balancing biases as they were: the backward pass moves them.

        So does a step in which the value head alone learns.
        """
        biases = [buffer for model in self.models for name, buffer in model.named_buffers() if name.endswith(EXPERT_BIAS)]
        before = [bias.clone() for bias in biases]
        applied = False
        try:
            yield
            applied = not warming_up
        finally:
            for bias, value in [] if applied else zip(biases, before, strict=True):
                bias.copy_(value)

    def _optimizer_step(self, optimizer: Any, schedule: Any, warming_up: bool) -> Values:
        from ctpo_megatron.mcore.optimizer_step import optimizer_step

        values = optimizer_step(optimizer, schedule, has_value_head=self.critic is not None, warming_up=warming_up)
        kinds = ("", "critic/") if self.critic is not None else ("",)
        self._moved |= any(scalar(values[f"{kind}grad_norm"]) > 0 and scalar(values[f"{kind}lr"]) > 0 for kind in kinds)
        return values

    def stream(
        self,
        bucket_bytes: int,
        *,
        per_stage: bool = False,
        to: int | None = None,
        memory: BucketMemory | None = None,
        only: Collection[str] | None = None,
    ) -> Iterator[NamedTensors]:
        """Full weights under their Hugging Face names, in buckets, each on the rank that sends it: see `export_stream`."""
        from ctpo_megatron.mcore.hf.stream import export_stream

        buckets = export_stream(self.models, self.shape, bucket_bytes, per_stage=per_stage, to=to, memory=memory, only=only)
        while True:
            with megatron_region(self.device):  # left before the caller goes on
                bucket = next(buckets, None)
            if bucket is None:
                return
            yield bucket

    def pieces(self) -> dict[str, Tensor]:
        """This rank's parts of what `stream` exports, by the keys that it knows them by: see `sources_of`."""
        from ctpo_megatron.mcore.hf.stream import sources_of

        return sources_of(self.models, self.shape)

    def save_hf(self, directory: str | Path) -> None:
        """Write the weights as a Hugging Face model directory."""
        from ctpo_megatron.mcore.hf.export import save_hf

        with megatron_region(self.device):
            save_hf(self.models, self.shape, self.model_path, directory)

    def save_adapter(self, directory: str | Path) -> None:
        """Write the adapters in peft's format. Raises ConfigError where there are none."""
        from ctpo_megatron.mcore.hf.peft import save_peft

        if self.adapter is None:
            raise ConfigError("save_adapter on a trainer rank that trains all weights.")
        with megatron_region(self.device):
            save_peft(self.models, self.shape, self.adapter, self.model_path, directory)

    def save(self, directory: str | Path, *, background: bool = False) -> None:
        """Save weights, optimizer and schedule as they are now, once the save before is settled.

        The checkpoint at `directory` was begun by `begin_checkpoint`.

        `background`: return when they are copied to host memory; the rest goes on beside training, see `settle`.
        """
        from ctpo_megatron.mcore.checkpoint.checkpoint import save_checkpoint

        if self._saver is None:
            raise ConfigError("save on a trainer rank that was built without an optimizer.")
        self.settle()
        with megatron_region(self.device):
            save_checkpoint(directory, self._trained(), self._saver, moved=self._moved)
        self._moved = False
        if not background:
            self.settle()

    def save_weights(self, directory: str | Path) -> None:
        """Save the weights as they are, and nothing else, as a checkpoint that `begin_checkpoint` began.

        The save in flight is settled first. Returns when it is verified and has its name.
        """
        from ctpo_megatron.mcore.checkpoint.checkpoint import save_checkpoint

        if self._saver is None:
            raise ConfigError("save_weights on a trainer rank that was built without an optimizer.")
        self.settle()
        with megatron_region(self.device):
            save_checkpoint(directory, replace(self._trained(), optimizer=None, schedule=None), self._saver)
        self.settle()

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait for the save in flight, if there is one, and raise what it failed with. Any thread may call it."""
        if self._saver is not None:
            self._saver.settle(timeout_s)

    def load(self, directory: str | Path) -> None:
        """Read weights, optimizer and schedule from a checkpoint."""
        from ctpo_megatron.mcore.checkpoint.checkpoint import load_checkpoint

        with megatron_region(self.device):
            load_checkpoint(directory, self._trained())

    def part(self) -> Part:
        """This rank's part of weights, optimizer, schedule and random states as they are now, copied to host memory."""
        from ctpo_megatron.mcore.checkpoint.part import Part
        from ctpo_megatron.mcore.checkpoint.snapshot import take_snapshot

        trained = self._trained()
        with megatron_region(self.device):
            return Part(take_snapshot(self.models, self.optimizer), trained.header(), self.parallel.model_dump())

    def recall(self, contents: Callable[[], Contents], read: Read) -> None:
        """Take all of that from the parts of a copy. Raises CopyLost, and is as it was then: see `checkpoint.recall`."""
        from ctpo_megatron.mcore.checkpoint.recall import recall

        with megatron_region(self.device):
            recall(self._trained(), self.parallel.model_dump(), contents, read)

    def _trained(self) -> Trained:
        from ctpo_megatron.mcore.checkpoint.checkpoint import Trained

        return Trained(self.models, self.optimizer, self.schedule, self.model_path, self._words)

    def close(self) -> None:
        """Leave the process groups, after the save in flight."""
        from ctpo_megatron.mcore import groups

        try:
            self.settle(CLOSE_TIMEOUT_S)
        finally:
            groups.destroy_parallel_groups()
            if dist.is_initialized():
                dist.destroy_process_group()
