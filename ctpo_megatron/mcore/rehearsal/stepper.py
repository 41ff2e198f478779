"""The schedule of a rehearsal: the trainer's own, with micro-batches that are described while they still have values."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ctpo_megatron.algorithms import Stats
from ctpo_megatron.algorithms.statistics import NONFINITE
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.mcore.reduction import Measured, reduce_stats
from ctpo_megatron.mcore.rehearsal.inputs import faked
from ctpo_megatron.mcore.step import PackedInput, Stepper
from ctpo_megatron.record.values import Min, Sum, Values


class FakeStepper(Stepper):
    """A `Stepper` whose shards are fake tensors, made by `prepare`."""

    def __init__(self, like: Stepper, vocab_size: int, *, fused: bool) -> None:
        # flash attention takes the borders of sequences, the portable one a layout of padded rows
        super().__init__(like.models, like.routers, vocab_size, like.device, portable=not fused)
        self._described: dict[int, PackedInput] = {}

    def prepare(self, shards: Iterable[MicroBatch], mode: FakeTensorMode) -> tuple[list[MicroBatch], list[Tensor]]:
        """Placed shards as fake tensors, and these tensors. Call it outside of `mode`."""
        fakes: list[MicroBatch] = []
        made: list[Tensor] = []
        for shard in shards:
            packed = faked(super()._describe(shard), mode, made)
            self._described[id(packed.shard)] = packed
            fakes.append(packed.shard)
        return fakes, made

    def _describe(self, shard: MicroBatch) -> PackedInput:
        return self._described[id(shard)]

    def reduce(self, per_micro_batch: list[Stats], measured: Measured | None = None) -> Values:
        """The last stage's reduction, with its collectives; what it found is made up, and not sent to the other stages."""
        reduced: Values = {}
        if self.is_last_stage:
            reduced = reduce_stats(per_micro_batch, self.dp_cp_group, measured or Measured())
        return reduced | {"loss": Sum(0.0), NONFINITE: Min(math.inf)}
