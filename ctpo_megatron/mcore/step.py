"""One pass over micro-batches: forward only, or forward, backward and gradient reduction.

The only file that knows megatron's scale factors. A loss function returns `share`; the sum of the shares over all
micro-batches and all data- and context-parallel ranks is the loss. On its way to the gradient megatron (0.16.1, without
`calculate_per_token_loss`) scales a share three times:

    x cp                pipeline_parallel.schedules.forward_step_calc_loss (loss functions that return two values)
    / n micro-batches   the same
    / (dp * cp)         DistributedDataParallel.__init__, gradient_scaling_factor, before it sums over dp * cp ranks

so `share * n * dp` yields the plain sum. The load-balancing loss of experts does not pass through here: the schedule gives it
the same cp / n (MoEAuxLossAutoScaler.set_loss_scale), DistributedDataParallel the same 1 / (dp * cp), and each context- and
tensor-parallel rank holds its part of a micro-batch's value (router.TopKRouter._apply_aux_loss), so what is added to the loss is
its mean over all micro-batches, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from ctpo_megatron.algorithms import LocalScan, Scan, Stats, Weighted
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.mcore.gathering import await_weight
from ctpo_megatron.mcore.groups import current_coords
from ctpo_megatron.mcore.host import forward_region
from ctpo_megatron.mcore.model.attention import compiled_layout, packed_layout, packed_params
from ctpo_megatron.mcore.model.compiled import compiles_attention
from ctpo_megatron.mcore.model.head import Head, in_model_precision, spread
from ctpo_megatron.mcore.model.rotary import rotary_positions
from ctpo_megatron.mcore.model.routing import Routers
from ctpo_megatron.mcore.model.value_head import value_head
from ctpo_megatron.mcore.reduction import Measured, once, reduce_stats
from ctpo_megatron.mcore.waits import Waits
from ctpo_megatron.parallel import ContextParallelScan, WordLogp
from ctpo_megatron.parallel.plain import broadcast_plain
from ctpo_megatron.record.values import DumpedValues, Values, dump_values, parse_values, scalar

LossFn = Callable[[Tensor, MicroBatch, Scan], tuple[Tensor, Stats]]
"""(logp [T_local] float32 with grad, this rank's shard, scan) -> (share, stats).

`stats` have the same names and shapes on every call. They are reduced over micro-batches and ranks.
"""


@dataclass(frozen=True, slots=True)
class PackedInput:
    """A shard and the micro-batch it belongs to: megatron's description, and what routers are told (`set_micro_batch`)."""

    shard: MicroBatch
    packed: PackedSeqParams
    counted: Tensor  # [T_local / tp] bool
    total: int
    written: Tensor | None  # [W] int64, positions whose labels the policy wrote, at least one; None: all of them


class Stepper:
    """Runs the schedule for a model. `portable` says that the layers are those of the portable spec.

    Micro-batches are this rank's shards on its device, as `shard` and `on_device` make them.
    """

    def __init__(
        self, models: list[torch.nn.Module], routers: Routers, vocab_size: int, device: torch.device, portable: bool
    ) -> None:
        self.models, self.routers, self.device, self.portable = models, routers, device, portable
        self.compiled = portable and compiles_attention(get_model_config(models[0]), device)
        self.cp_group = parallel_state.get_context_parallel_group()
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.pp_group = parallel_state.get_pipeline_model_parallel_group()
        self.dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        self.coords = current_coords(routers.expert_layers)
        self.head = Head.of(models, vocab_size, self.tp_group)
        self.value_head = value_head(models)
        self.scan: Scan = ContextParallelScan(self.cp_group) if self.cp_group.size() > 1 else LocalScan()
        self.waits = Waits(device)
        get_model_config(models[0]).timers = self.waits  # the chunks of a model have one config

    def logp(self, micro_batches: list[MicroBatch], temperature: float) -> list[Tensor]:
        """Log-probs of the labels of each shard, [T_local] float32; an empty list before the last pipeline stage."""

        def collect(described: PackedInput, hidden: Tensor, non_loss_data: bool) -> Tensor:
            return self._words(hidden, described.shard, temperature, labels_only=True).logp

        return self._forward(micro_batches, collect)

    def logp_and_values(self, micro_batches: list[MicroBatch], temperature: float) -> list[tuple[Tensor, Tensor | None]]:
        """The same with the values [T_local] of a model with a value head."""

        def collect(described: PackedInput, hidden: Tensor, non_loss_data: bool) -> tuple[Tensor, Tensor | None]:
            found = self._words(hidden, described.shard, temperature, labels_only=True)
            return found.logp, self._values(hidden, described)

        return self._forward(micro_batches, collect)

    def _forward(self, micro_batches: list[MicroBatch], collect: Callable[..., Any]) -> list[Any]:
        for model in self.models:
            model.eval()
        try:
            with torch.no_grad():
                return self._run(micro_batches, collect, forward_only=True)
        finally:
            for model in self.models:
                model.train()

    def forward_backward(self, micro_batches: list[MicroBatch], loss_fn: LossFn, temperature: float) -> Values:
        """Gradients of the summed shares, reduced over ranks; returns `loss` and the reduced statistics, on every rank.

        Log-probs of labels that the policy did not write are not found, nor values before these: they are 0.
        """
        factor = len(micro_batches) * self.dp_size

        def loss(described: PackedInput, hidden: Tensor) -> tuple[Tensor, Stats]:
            shard = described.shard
            found = self._words(hidden, shard, temperature, written=described.written)
            streams = {"policy_top_k_logp": found.top_k_logp, "values": self._values(hidden, described)}
            share, stats = loss_fn(found.logp, shard.with_streams(**streams), self.scan)
            return share * factor, Stats(sums={"loss": share.detach()}) | word_stats(shard, found) | stats

        for model in self.models:
            model.zero_grad_buffer()  # type: ignore[operator]  # megatron's DistributedDataParallel, see `build_model`
        self.routers.begin()
        per_micro_batch = self._run(micro_batches, loss, forward_only=False)
        reduced = self.reduce(per_micro_batch, self.routers.measure())
        return reduced | once({"loss": scalar(reduced["loss"])})

    def _words(self, hidden: Tensor, shard: MicroBatch, temperature: float, **options: Any) -> WordLogp:
        if self.head is None:
            raise RuntimeError("log-probs are asked of a rank before the last pipeline stage")
        await_weight(self.models, self.head.weight)
        return self.head(hidden, shard, temperature, **options)

    def _values(self, hidden: Tensor, described: PackedInput) -> Tensor | None:
        """Values [T_local] float32 where the policy wrote; None without a value head."""
        if self.value_head is None:
            return None
        hidden, written = hidden.squeeze(0), described.written
        if written is None:
            return self.value_head(hidden)
        return spread(self.value_head(hidden.index_select(0, written)), written, hidden.shape[0])

    def shard(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """This rank's shards of whole micro-batches, where these are; of a replay only what its routers see."""
        return [self._shard(whole) for whole in micro_batches]

    def on_device(self, shards: list[MicroBatch]) -> list[MicroBatch]:
        """The shards on this rank's device."""
        return [shard.to(self.device) for shard in shards]

    def _shard(self, whole: MicroBatch) -> MicroBatch:
        if whole.replay is not None:
            whole = replace(whole, replay=whole.replay.for_rank(self.coords, whole.sequences.cu_seqlens))
        return whole.shard(self.coords.cp_rank, self.coords.cp_size)

    def _run(self, shards: list[MicroBatch], loss: Callable[..., Any], forward_only: bool) -> list[Any]:
        described = [self._describe(shard) for shard in shards]
        schedule = get_forward_backward_func()
        per_chunk = [iter(described) for _ in self.models]  # every chunk of an interleaved stage sees all micro-batches
        return schedule(
            forward_step_func=partial(_forward_step, loss, self.routers),
            data_iterator=per_chunk if len(per_chunk) > 1 else per_chunk[0],
            model=self.models,
            num_microbatches=len(shards),
            seq_length=max(shard.tokens.input_ids.numel() for shard in shards) * self.cp_group.size(),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _describe(self, shard: MicroBatch) -> PackedInput:
        sequences = shard.sequences.to(torch.device("cpu"))
        if self.portable:
            layout = compiled_layout if self.compiled else packed_layout
            packed = layout(sequences, self.device, self.cp_group.rank(), self.cp_group.size())
        elif sequences.prefixes is not None:
            raise ValueError("TransformerEngine's attention reads no prompt for several sequences; set train.share_prompts=null")
        else:
            packed = packed_params(sequences.cu_seqlens, self.device)
        # sequence parallelism gives each tensor-parallel rank an equal run
        counted = shard.counted(self.coords.cp_size).chunk(self.coords.tp_size)[self.coords.tp_rank]
        return PackedInput(shard, packed, counted, int(shard.sequences.lengths.sum()), _written(shard.tokens.mask))

    def reduce(self, per_micro_batch: list[Stats], measured: Measured | None = None) -> Values:
        """Statistics over micro-batches, data- and context-parallel ranks, on every rank; see `reduction.reduce_stats`.

        Only the last pipeline stage's argument counts; the other stages receive what it found.
        """
        reduced: Values = {}
        if self.is_last_stage:
            reduced = reduce_stats(per_micro_batch, self.dp_cp_group, measured or Measured())
        if self.pp_group.size() > 1:
            last = self.pp_group.size() - 1
            reduced = parse_values(broadcast_plain(dump_values(reduced), DumpedValues, self.pp_group, source=last))
        return reduced


def _written(mask: Tensor) -> Tensor | None:
    """Positions where `mask` [T] is True, the first one where it is nowhere; None where it is everywhere."""
    index = mask.nonzero().squeeze(1)
    if index.numel() == mask.numel():
        return None
    return index if index.numel() else index.new_zeros(1)


def word_stats(shard: MicroBatch, found: WordLogp) -> Stats:
    """Means over the tokens that the policy wrote: its entropy, and the mass of what sampling could have drawn, if truncated."""
    if found.entropy is None:
        raise ValueError("the entropy was not asked for")
    mask = shard.tokens.mask
    each = {"entropy": found.entropy} | ({} if found.support_mass is None else {"support_mass": found.support_mass})
    return Stats(means={name: Weighted(torch.where(mask, value, 0.0).sum(), mask.sum()) for name, value in each.items()})


def _forward_step(
    loss: Callable[..., Any], routers: Routers, batches: Iterator[PackedInput], model: torch.nn.Module
) -> tuple[Tensor, Callable[..., Any]]:
    """megatron's forward step: the stage's output, and what the last stage makes of it."""
    described = next(batches)
    shard = described.shard
    followed = None if shard.replay is None else shard.replay.routed_experts
    routers.set_micro_batch(model, described.counted, described.total, routed_experts=followed)
    with forward_region(shard.tokens.input_ids.device), rotary_positions(model, described.packed):
        output = model(
            shard.tokens.input_ids.unsqueeze(0),
            shard.tokens.position_ids.unsqueeze(0),
            None,
            packed_seq_params=described.packed,
            **in_model_precision(model),
        )
    return output, partial(loss, described)
