"""One pass over micro-batches: forward only, or forward, backward and gradient reduction.

The only file that knows megatron's scale factors. A loss function returns `share`; the sum of the shares over all
micro-batches and all data- and context-parallel ranks is the loss. On its way to the gradient megatron (0.16.1, without
`calculate_per_token_loss`) scales a share three times:

    x cp                pipeline_parallel.schedules.forward_step_calc_loss (loss functions that return two values)
    / n micro-batches   the same
    / (dp * cp)         DistributedDataParallel.__init__, gradient_scaling_factor, before it sums over dp * cp ranks

so `share * n * dp` yields the plain sum. The load-balancing loss of experts does not pass through here: the schedule gives it
the same cp / n (MoEAuxLossAutoScaler.set_loss_scale), DistributedDataParallel the same 1 / (dp * cp), and each context- and
tensor-parallel rank holds its part of a pack's value (router.TopKRouter._apply_aux_loss), so what is added to the loss is its
mean over all micro-batches, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ctpo_megatron.algorithms.scan import LocalScan, Scan
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.mcore.model.attention import packed_layout, packed_params
from ctpo_megatron.mcore.model.head import Head, in_model_precision
from ctpo_megatron.mcore.model.routing import Routers
from ctpo_megatron.parallel import ContextParallelScan, RankCoords, own_experts

LossFn = Callable[[Tensor, MicroBatch, Scan], tuple[Tensor, dict[str, Tensor]]]
"""(logp [T_local] float32 with grad, this rank's shard, scan) -> (share, stats).

`stats` are scalars or vectors whose keys begin with `sum/`, `max/` or `min/`, the same on every call; that is how they are
reduced over micro-batches and ranks. A vector `sum/x` comes out as `sum/x/0`, `sum/x/1`, ...
"""


@dataclass(frozen=True, slots=True)
class PackedInput:
    """A shard and the pack it belongs to: megatron's description, and what routers of experts are told (`Routers.aim`)."""

    shard: MicroBatch
    packed: PackedSeqParams
    counted: Tensor  # [T_local / tp] bool
    total: int


class Stepper:
    """Runs the schedule for a model. `portable` says that the layers are those of the portable spec.

    Micro-batches are this rank's shards on its device, as `place` makes them.
    """

    def __init__(
        self, models: list[torch.nn.Module], routers: Routers, vocab_size: int, device: torch.device, portable: bool
    ) -> None:
        self.models, self.routers, self.device, self.portable = models, routers, device, portable
        self.cp_group = parallel_state.get_context_parallel_group()
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.pp_group = parallel_state.get_pipeline_model_parallel_group()
        self.dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        self.coords = RankCoords(
            dp_rank=parallel_state.get_data_parallel_rank(),
            cp_rank=self.cp_group.rank(),
            cp_size=self.cp_group.size(),
            tp_rank=self.tp_group.rank(),
            tp_size=self.tp_group.size(),
            expert_layers=routers.expert_layers,
        )
        self.head = Head.of(models, vocab_size, self.tp_group)
        self.scan: Scan = ContextParallelScan(self.cp_group) if self.cp_group.size() > 1 else LocalScan()

    def logp(self, micro_batches: list[MicroBatch], temperature: float) -> list[Tensor]:
        """Log-probs of the labels of each shard, [T_local] float32; an empty list before the last pipeline stage."""

        def collect(shard: MicroBatch, hidden: Tensor, non_loss_data: bool) -> Tensor:
            return self.head(hidden, shard, temperature, labels_only=True).logp

        for model in self.models:
            model.eval()
        try:
            with torch.no_grad():
                return self._run(micro_batches, collect, forward_only=True)
        finally:
            for model in self.models:
                model.train()

    def forward_backward(self, micro_batches: list[MicroBatch], loss_fn: LossFn, temperature: float) -> dict[str, float]:
        """Gradients of the summed shares, reduced over ranks; returns `loss` and the reduced statistics, on every rank."""
        factor = len(micro_batches) * self.dp_size

        def loss(shard: MicroBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            found = self.head(hidden, shard, temperature)
            share, stats = loss_fn(found.logp, shard.with_policy_support_logp(found.support_logp), self.scan)
            masked_entropy = torch.where(shard.mask, found.entropy, 0.0).sum()
            return share * factor, {"sum/loss": share.detach(), "sum/entropy": masked_entropy, **stats}

        for model in self.models:
            model.zero_grad_buffer()
        self.routers.begin()
        per_micro_batch = self._run(micro_batches, loss, forward_only=False)
        reduced = self.reduce(per_micro_batch, self.routers.measure())
        reduced["loss"] = reduced.pop("sum/loss")
        return reduced

    def place(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """This rank's shards of whole packs, on its device; of `routed_experts` only what its routers see."""
        return [self._place(whole).to(self.device) for whole in micro_batches]

    def _place(self, whole: MicroBatch) -> MicroBatch:
        if whole.routed_experts is not None:
            own = own_experts(whole.routed_experts, whole.cu_seqlens, self.coords)
            whole = replace(whole, routed_experts=None, own_experts=own)
        return whole.shard(self.coords.cp_rank, self.coords.cp_size)

    def _run(self, shards: list[MicroBatch], loss: Callable, forward_only: bool) -> list:
        described = [self._describe(shard) for shard in shards]
        schedule = get_forward_backward_func()
        per_chunk = [iter(described) for _ in self.models]  # every chunk of an interleaved stage sees all micro-batches
        return schedule(
            forward_step_func=partial(_forward_step, loss, self.routers),
            data_iterator=per_chunk if len(per_chunk) > 1 else per_chunk[0],
            model=self.models,
            num_microbatches=len(shards),
            seq_length=max(shard.input_ids.numel() for shard in shards) * self.cp_group.size(),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _describe(self, shard: MicroBatch) -> PackedInput:
        cu_seqlens = shard.cu_seqlens.cpu()
        if self.portable:
            packed = packed_layout(cu_seqlens, self.device, self.cp_group.rank(), self.cp_group.size())
        else:
            packed = packed_params(cu_seqlens, self.device)
        # sequence parallelism gives each tensor-parallel rank an equal run
        counted = shard.counted(self.coords.cp_size).chunk(self.coords.tp_size)[self.coords.tp_rank]
        return PackedInput(shard, packed, counted, int(shard.lengths.sum()))

    def reduce(
        self, per_micro_batch: list[dict[str, Tensor]], measured: tuple[list[str], Tensor] | None = None
    ) -> dict[str, float]:
        """Statistics over micro-batches, data- and context-parallel ranks, on every rank.

        Only the last pipeline stage's argument counts; the other stages receive what it found. `measured`: names and values [n]
        that are the same on every rank already and join the others on their way to the host.
        """
        reduced: dict[str, float] = {}
        if self.is_last_stage:
            reduced = self._reduce_on_last_stage(per_micro_batch, measured or ([], torch.zeros(0, device=self.device)))
        if self.pp_group.size() > 1:
            box = [reduced]
            last = dist.get_global_rank(self.pp_group, self.pp_group.size() - 1)
            dist.broadcast_object_list(box, src=last, group=self.pp_group, device=self.device)
            reduced = box[0]
        return reduced

    def _reduce_on_last_stage(
        self, per_micro_batch: list[dict[str, Tensor]], measured: tuple[list[str], Tensor]
    ) -> dict[str, float]:
        first = per_micro_batch[0]
        keys = first.keys()
        sums = sorted(key for key in keys if key.startswith("sum/"))
        extremes = sorted(key for key in keys if key.startswith(("max/", "min/")))
        if len(sums) + len(extremes) < len(keys):
            raise ValueError(f"statistics {sorted(keys - {*sums, *extremes})} must begin with sum/, max/ or min/")
        values = torch.stack([_vector(stats, [*sums, *extremes]) for stats in per_micro_batch])
        added = [name for key in sums for name in _entries(key, first[key])]
        extremes = [name for key in extremes for name in _entries(key, first[key])]
        total = values[:, : len(added)].sum(0)
        dist.all_reduce(total, group=self.dp_cp_group)
        if extremes:  # a minimum is the negative of the largest negative
            sign = torch.tensor([-1.0 if key.startswith("min/") else 1.0 for key in extremes]).to(values)
            top = (values[:, len(added) :] * sign).amax(0)
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.dp_cp_group)
            total = torch.cat([total, top * sign])
        total = torch.cat([total, measured[1].to(total)])
        return dict(zip([*added, *extremes, *measured[0]], total.tolist(), strict=True))  # the one host sync of a step


def _vector(stats: dict[str, Tensor], keys: list[str]) -> Tensor:
    return torch.cat([stats[key].detach().double().reshape(-1) for key in keys])


def _entries(key: str, value: Tensor) -> list[str]:
    return [key] if value.dim() == 0 else [f"{key}/{i}" for i in range(value.numel())]


def _forward_step(
    loss: Callable, routers: Routers, batches: Iterator[PackedInput], model: torch.nn.Module
) -> tuple[Tensor, Callable]:
    """megatron's forward step: the stage's output, and what the last stage makes of it."""
    described = next(batches)
    shard = described.shard
    routers.aim(model, described.counted, described.total, experts=shard.own_experts)
    output = model(
        shard.input_ids.unsqueeze(0),
        shard.position_ids.unsqueeze(0),
        None,
        packed_seq_params=described.packed,
        **in_model_precision(model),
    )
    return output, partial(loss, shard)
