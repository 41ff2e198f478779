"""Low-rank adapters beside megatron's linear layers: what comes out of a layer is W x + s B (A x), of which A and B are trained.

Only [T, rank] travels between tensor-parallel ranks. With sequence parallelism, which always comes with them here:

    rows of W are cut      x [T / tp, in] --A--> [T / tp, r] --gather--> [T, r] --own rows of B--> [T, out / tp]
    columns of W are cut   x [T, in / tp] --own part of A--> part of [T, r] --reduce-scatter--> [T / tp, r] --B--> [T / tp, out]

What of a pair is whole on every rank has seen a part of the tokens, and so has a part of its gradient: megatron adds these up for
parameters that are marked `sequence_parallel`, norms among them.

An expert's tokens are whole on every rank of its tensor-parallel group, and megatron adds up what these ranks put out. So nothing
of an expert's adapter travels in the forward pass; what of a pair is whole on every rank has a part of its gradient there, and
these are added up in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.mcore.groups import current_coords
from ctpo_megatron.mcore.hf.cuts import unpack
from ctpo_megatron.mcore.hf.load import layer_numbers
from ctpo_megatron.mcore.model.pairs import Pair
from ctpo_megatron.models.adapters import ADAPTER, WEIGHT, adapted_tensors
from ctpo_megatron.models.shape import HeadAttention, ModelShape
from ctpo_megatron.models.tensors import HfTensor, hf_tensors, parameter_key


class LinearAdapter(nn.Module):
    """The pairs of one of megatron's linear layers, each a child of its projection's name.

    `tensors`: those that the layer's weight is made of; `groups`: of queries on this rank, where their keys and values follow.
    """

    def __init__(
        self, tensors: Sequence[HfTensor], pairs: dict[str, Pair], groups: int, shape: ModelShape, tp_group: Any
    ) -> None:
        super().__init__()
        self.enabled = True
        self.cut, self.by_column = tensors[0].cut, tensors[0].cut.dim == 1
        self.groups = groups if self.cut.join == "grouped" else 0
        self.shape, self.tp_group = shape, tp_group
        cut = 1 if self.by_column else tp_group.size()
        self.outputs = [(pairs.get(tensor.name), tensor.shape[0] // cut) for tensor in tensors]
        self.pairs = list(pairs.values())
        for pair in self.pairs:
            self.add_module(pair.adapted.target, pair)

    def forward(self, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """What is added to the output of the layer for the input x [T, ..., in]. `norm`: weight of a norm within the layer."""
        if norm is not None:
            x = F.rms_norm(x, norm.shape, norm, self.shape.rms_eps)
        inner = self.inner(x, torch.cat([pair.a for pair in self.pairs]))
        scaled = iter((inner * self.pairs[0].scale).chunk(len(self.pairs), dim=-1))
        parts = [
            inner.new_zeros(*inner.shape[:-1], rows) if pair is None else F.linear(next(scaled), self.outer(pair.b))
            for pair, rows in self.outputs
        ]
        return self.joined(parts)

    def joined(self, parts: list[Tensor]) -> Tensor:
        """What belongs to the outputs of each tensor [..., rows] in the order of the layer's outputs."""
        if self.groups:
            return torch.cat([part.unflatten(-1, (self.groups, -1)) for part in parts], dim=-1).flatten(-2)
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def pieces(self, weight: Tensor) -> list[tuple[Pair | None, Tensor]]:
        """What the layer's weight has of each of its tensors, and their pairs."""
        pieces = unpack(self.cut, weight.detach(), self.shape)
        return [(pair, piece) for (pair, _), piece in zip(self.outputs, pieces, strict=True)]

    def factor(self, weight: Tensor) -> Tensor | None:
        """By what each output of the layer is multiplied (DoRA), float32; None where there is no such thing. Collective."""
        if self.pairs[0].m is None:
            return None
        found = [None if pair is None else pair.factor(piece) for pair, piece in self.pieces(weight)]
        sizes = [rows for _, rows in self.outputs]
        return self.joined(
            [weight.new_ones(n, dtype=torch.float32) if f is None else f for f, n in zip(found, sizes, strict=True)]
        )

    def inner(self, x: Tensor, a: Tensor) -> Tensor:
        """A x [T, ..., ranks of all pairs] of the tokens that this rank puts out."""
        inner = F.linear(x, a)
        if self.tp_group.size() == 1:
            return inner
        if self.by_column:
            return reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        return gather_from_sequence_parallel_region(inner, group=self.tp_group)

    def outer(self, b: Tensor) -> Tensor:
        """B as the forward pass takes it."""
        return b


class ExpertAdapter(LinearAdapter):
    """The pairs of a linear layer of one expert; `tp_group` is that of expert tensor parallelism."""

    def inner(self, x: Tensor, a: Tensor) -> Tensor:
        """A x, or this rank's part of it where the columns are cut."""
        return F.linear(x, a if self.by_column else self.whole(a))

    def outer(self, b: Tensor) -> Tensor:
        """B, which is whole where the columns are cut."""
        return self.whole(b) if self.by_column else b

    def whole(self, parameter: Tensor) -> Tensor:
        """The same parameter, of whose gradient each rank of the group has a part."""
        return copy_to_tensor_model_parallel_region(parameter, group=self.tp_group)


def _add(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None] | None:
    """A forward hook of the layer."""
    if not linear.adapter.enabled:
        return None
    result, bias = output
    added = linear.adapter(inputs[0], getattr(linear, "layer_norm_weight", None))
    factor = linear.adapter.factor(linear.weight)
    if factor is None:
        return result + added, bias
    within = linear.bias if bias is None and linear.bias is not None and linear.bias.numel() else 0.0  # is no part of the rows
    return (factor * (result - within + added)).to(result.dtype) + within, bias


def add_of_experts(
    linear: Any, inputs: tuple[Tensor, list[int]], output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None] | None:
    """A forward hook of TransformerEngine's layer of all experts of a rank, whose tokens come one expert after the other."""
    adapters: Sequence[LinearAdapter] = list(linear.adapter)
    if not adapters[0].enabled:
        return None
    (tokens, counts), (result, bias) = inputs, output
    added = [adapter(x) for adapter, x in zip(adapters, tokens.split(counts), strict=True)]
    return result + torch.cat(added), bias


class _Adding:
    """Finds the adapters of this rank's linear layers, by the names of their parameters."""

    def __init__(self, model: Any, shape: ModelShape, adapter: LoraConfig, dtype: torch.dtype) -> None:
        self.shape, self.scale, self.dtype = shape, adapter.scale, dtype
        self.adapted = {each.base.name: each for each in adapted_tensors(shape, adapter)}
        self.by_key: dict[str, list[HfTensor]] = {}
        for tensor in hf_tensors(shape):
            self.by_key.setdefault(tensor.key, []).append(tensor)
        coords, attention = current_coords(), shape.attention
        self.layers, self.first_expert = layer_numbers(model), coords.ep_rank * (shape.num_experts // coords.ep_size)
        self.groups = attention.num_kv_heads // coords.tp_size if isinstance(attention, HeadAttention) else 0
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.expert_group = parallel_state.get_expert_tensor_parallel_group()

    def of(self, name: str) -> LinearAdapter | None:
        """The adapter of the layer whose weight this rank's model calls `name`; None where it has none."""
        tensors = self.by_key.get(parameter_key(name, self.layers, self.first_expert), [])
        mine = [self.adapted[tensor.name] for tensor in tensors if tensor.name in self.adapted]
        if not mine:
            return None
        kind, group = (LinearAdapter, self.tp_group) if tensors[0].expert is None else (ExpertAdapter, self.expert_group)
        pairs = {each.base.name: Pair(each, self.scale, group, self.dtype) for each in mine}
        return kind(tensors, pairs, self.groups, self.shape, group)


def add_adapters(model: Any, shape: ModelShape, adapter: LoraConfig, dtype: torch.dtype) -> None:
    """Freeze a GPTModel and give its linear layers their adapters."""
    model.requires_grad_(False)
    adding = _Adding(model, shape, adapter, dtype)
    for name, linear in list(model.named_modules()):
        if hasattr(linear, "weight0"):  # TransformerEngine's, of all experts of this rank
            several = [adding.of(f"{name}{WEIGHT}{number}") for number in range(linear.num_gemms)]
            if adapters := [each for each in several if each is not None]:
                linear.add_module(ADAPTER, nn.ModuleList(adapters))
                linear.register_forward_hook(add_of_experts)
        elif (one := adding.of(name + WEIGHT)) is not None:
            linear.add_module(ADAPTER, one)
            linear.register_forward_hook(_add)
    if model.pre_process and model.config.recompute_granularity is not None:
        # what is computed again without gradients takes part in the backward pass only if an input of it does
        model.embedding.register_forward_hook(lambda _module, _inputs, hidden: hidden.requires_grad_(torch.is_grad_enabled()))


def linear_adapters(models: Iterable[nn.Module]) -> Iterator[LinearAdapter]:
    """All adapters of this rank's part of the model, in its order."""
    for model in models:
        yield from (module for module in model.modules() if isinstance(module, LinearAdapter))


def adapted_pieces(models: Iterable[nn.Module]) -> Iterator[tuple[Pair, Tensor]]:
    """Pairs, and this rank's pieces of the tensors that they belong to; of experts none."""
    linear: Any
    for linear in (module for model in models for module in model.modules()):
        adapter = getattr(linear, ADAPTER, None)
        if isinstance(adapter, LinearAdapter) and not isinstance(adapter, ExpertAdapter):
            yield from ((pair, piece) for pair, piece in adapter.pieces(linear.weight) if pair is not None)


def adapter_pairs(models: Iterable[nn.Module]) -> Iterator[Pair]:
    """Their pairs; none where all weights are trained."""
    for adapter in linear_adapters(models):
        yield from adapter.pairs


def adapter_parameters(models: Iterable[nn.Module]) -> Iterator[tuple[HfTensor, nn.Parameter]]:
    """What of them is trained, by the names and shapes of the whole tensors."""
    for pair in adapter_pairs(models):
        yield from pair.parts()


@contextmanager
def adapters_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside it the model computes what it would without its adapters."""
    adapters = list(linear_adapters(models))
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True
