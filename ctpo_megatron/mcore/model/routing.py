"""Routers of mixtures of experts that can follow a given routing, count where tokens go, and know padding from tokens.

Routing replay (R3, arXiv 2510.11370): a token goes to the experts I that the inference engine chose when it sampled, with the
gates of the trainer's own logits s, g_i = exp(s_i) / sum_{j in I} exp(s_j) (or what the model makes of its chosen scores). The
gradient flows through the gates as ever.

megatron (0.16.1) has a seam for it, `TopKRouter.router_replay.get_replay_topk`, through which a router finds its experts.
Its own `RouterReplay` follows all tokens or none, lives in one list per process, and has to be told when a layer is computed
again for the backward pass; `Replay` stands in its place. tests/dist/test_routing.py holds the seam.

Padding goes through experts like any token, but counts in nothing: not in the balancing loss, the z-loss, the balancing bias or
the measured load. How much of it there is depends on the layout, and no layout may change the numbers. megatron's own
`padding_mask` does not reach the routers of later pipeline stages, does not fit the tokens of a balancing bias, and divides the
z-loss by each rank's own tokens, so the mask comes with the routing instead.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from ctpo_megatron.mcore.reduction import Measured
from ctpo_megatron.models.shape import ModelShape

TopKFn = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one router is told of a micro-batch."""

    counted: Tensor  # [tokens] bool, those of this rank; False on padding
    total: int  # tokens of the whole micro-batch without padding, over all context- and tensor-parallel ranks
    routed_experts: Tensor | None  # [tokens, k] to follow, -1: the router chooses itself; None: for all tokens


class Replay:
    """Answers for one router what its top k are. `routed_experts` [tokens, k]: those of the micro-batch at hand."""

    def __init__(self) -> None:
        self.routed_experts: Tensor | None = None
        self.training = False
        self.followed: Tensor | None = None  # [tokens, k] of the last call that had a routing to follow
        self.counts: Tensor | None = None  # choices replayed, and those of them that the router would not have made

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopKFn
    ) -> tuple[Tensor, Tensor]:
        """The chosen experts' scores and numbers, [tokens, k] both; megatron calls it with `scores` [tokens, experts]."""
        values, own = default_compute_topk(scores, topk, num_groups, group_topk)
        routed = self.routed_experts
        if routed is None:
            self.followed = None
            return values, own
        if routed.shape != own.shape:
            raise ValueError(f"the routing to follow is {list(routed.shape)}, the router's own {list(own.shape)}")
        given, known = routed.to(own.dtype), routed >= 0
        self.followed = torch.where(known, given, own)
        if self.training:
            unlike = known & (given.unsqueeze(2) != own.unsqueeze(1)).all(2)
            counts = torch.stack([known.sum(), unlike.sum()])
            self.counts = counts if self.counts is None else self.counts + counts
        return scores.gather(1, self.followed), self.followed


class ReplayRouter(TopKRouter):
    """megatron's router, told by `next` what it sees. `load` [experts]: tokens of each expert since `begin`, in training.

    Layers that are computed again count twice, and so does what it is compared with.
    """

    def __init__(self, config: Any, pg_collection: Any = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        if config.moe_router_fusion:
            raise ValueError("moe_router_fusion chooses experts in one kernel that cannot be told which to take")
        self.router_replay = Replay()
        self.next: Seen | None = None  # of the micro-batch that comes
        self.load: Tensor | None = None
        self._seen: Seen | None = None  # of the one at hand
        self._again: deque[Seen] = deque()

    def begin(self) -> None:
        """Before the first micro-batch of a training pass."""
        self.load = self.router_replay.counts = None
        self._again.clear()

    def forward(self, input: Tensor, _padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `TopKRouter`: gates and map, [tokens, experts] both."""
        self._seen = seen = self._due()
        self.router_replay.routed_experts, self.router_replay.training = seen.routed_experts, self.training
        gates, chosen = super().forward(input, ~seen.counted)
        if self.training:
            load = self._counted(chosen.detach()).sum(0)
            self.load = load if self.load is None else self.load + load
        return gates, chosen

    def _due(self) -> Seen:
        """What it is told of the micro-batch at hand.

        A layer that is computed again in the backward pass runs without gradients the first time and with them the second; in
        between come other micro-batches, whose backward passes follow one another in the order of their forward passes.
        """
        if self.next is None:
            raise RuntimeError("a router computes before it was told of a micro-batch; see Routers.set_micro_batch")
        if not self.training:
            return self.next
        if not torch.is_grad_enabled():
            self._again.append(self.next)
            return self.next
        return self._again.popleft() if self._again else self.next

    @property
    def _at_hand(self) -> Seen:
        if self._seen is None:
            raise RuntimeError("a router is asked about a micro-batch before its forward pass")
        return self._seen

    def _counted(self, routing_map: Tensor) -> Tensor:
        """The map [tokens, experts] without padding."""
        return routing_map & self._at_hand.counted.unsqueeze(1)

    def _apply_aux_loss(self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, **options: Any) -> Tensor:
        """The load in the balancing loss is that of the experts which were used; megatron's would be the router's wish."""
        if self._at_hand.total == 0:  # a mean over nothing
            return probs
        followed = self.router_replay.followed
        if followed is not None:
            routing_map = self._counted(torch.zeros_like(routing_map).scatter(1, followed, True))
        return super()._apply_aux_loss(probs, scores_for_aux_loss, routing_map, **options)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """[tokens, experts] unchanged, with the gradient of this rank's share of the z-loss, a mean over the micro-batch."""
        coeff = self.config.moe_z_loss_coeff
        if not (coeff and self.training and torch.is_grad_enabled() and self._at_hand.total):
            return logits
        squares = torch.logsumexp(logits, dim=-1).square()
        share = torch.where(self._at_hand.counted, squares, 0.0).sum() * (coeff / self._at_hand.total)
        return MoEAuxLossAutoScaler.apply(logits, share)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """What moves the balancing bias. megatron's own masking fails: it lays a mask of tokens over the experts."""
        super()._apply_expert_bias(self._counted(routing_map))


def with_replay(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """A copy of the layers, in which those with experts have a `ReplayRouter`."""
    return replace(block, layer_specs=[_layer(spec) for spec in block.layer_specs])


def _layer(spec: Any) -> Any:
    mlp = spec.submodules.mlp
    if not hasattr(getattr(mlp, "submodules", None), "router"):
        return spec
    mlp = replace(mlp, submodules=replace(mlp.submodules, router=ReplayRouter))
    return replace(spec, submodules=replace(spec.submodules, mlp=mlp))


class Routers:
    """The routers of this rank's model chunks. Nothing in it does anything for a dense model."""

    def __init__(self, models: list[torch.nn.Module], shape: ModelShape, device: torch.device) -> None:
        self._shape, self._device = shape, device
        place = {number: i for i, number in enumerate(shape.expert_layers)}
        self._chunks: dict[torch.nn.Module, list[ReplayRouter]] = {
            chunk: [module for module in chunk.modules() if isinstance(module, ReplayRouter)] for chunk in models
        }
        self._all = [router for routers in self._chunks.values() for router in routers]
        self.expert_layers = tuple(place[router.layer_number - 1] for router in self._all)  # places among the expert layers
        self._replaying = False

    def begin(self) -> None:
        """Before the first micro-batch of a training pass: forget what was counted."""
        self._replaying = False
        for router in self._all:
            router.begin()

    def set_micro_batch(self, chunk: torch.nn.Module, counted: Tensor, total: int, *, routed_experts: Tensor | None) -> None:
        """Before `chunk` computes a micro-batch: what its routers see of it; see `Seen`.

        `routed_experts`: [T / (cp * tp), expert layers of all this rank's chunks, k], see `parallel.own_experts`; None: none to
        follow.
        """
        self._replaying |= routed_experts is not None
        first = 0
        for each, routers in self._chunks.items():
            if each is chunk:
                for i, router in enumerate(routers, start=first):
                    router.next = Seen(counted, total, None if routed_experts is None else routed_experts[:, i])
            first += len(routers)

    def measure(self) -> Measured:
        """Numbers of what the last training pass did, the same on every rank; collective, and no wait for the device.

        `moe/load_max_over_mean/layer_n`: tokens of the busiest expert over the mean; 1 is even. `moe/load_entropy/layer_n`:
        entropy of the load over its largest value; 1 is even. `routing/changed`: the share of replayed choices that the trainer's
        router would not have made. Padding does not count. `moe/load/layer_n` [experts]: tokens of each expert over the mean.
        """
        layers, experts = self._shape.expert_layers, self._shape.num_experts
        if not layers:
            return Measured()
        counts = torch.zeros(len(layers), experts + 2, dtype=torch.int64, device=self._device)
        for place, router in zip(self.expert_layers, self._all, strict=True):
            if router.load is not None:
                counts[place, :experts] = router.load
            if router.router_replay.counts is not None:
                counts[place, experts:] = router.router_replay.counts
        dist.all_reduce(counts)  # ranks have other tokens or other layers, never the same of both
        load, replayed = counts[:, :experts].double(), counts[:, experts:].sum(0).double()
        share = load / load.sum(1, keepdim=True)
        entropy = -torch.xlogy(share, share).sum(1) / math.log(max(experts, 2))
        names = [f"moe/{name}/layer_{n}" for name in ("load_max_over_mean", "load_entropy") for n in layers]
        values = torch.cat([share.amax(1) * experts, entropy])
        if self._replaying:
            names, values = [*names, "routing/changed"], torch.cat([values, replayed[1:] / replayed[:1].clamp(min=1)])
        return Measured(names, values, {f"moe/load/layer_{n}": row * experts for n, row in zip(layers, share, strict=True)})
