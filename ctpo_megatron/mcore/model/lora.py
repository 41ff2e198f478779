"""Low-rank adapters beside megatron's linear layers: what comes out of a layer is W x + s B (A x), of which A and B are trained.

Only [T, rank] travels between tensor-parallel ranks. With sequence parallelism, which always comes with them here:

    rows of W are cut      x [T / tp, in] --A--> [T / tp, r] --gather--> [T, r] --own rows of B--> [T, out / tp]
    columns of W are cut   x [T, in / tp] --own part of A--> part of [T, r] --reduce-scatter--> [T / tp, r] --B--> [T / tp, out]

What of a pair is whole on every rank has seen a part of the tokens, and so has a part of its gradient: megatron adds these up for
parameters that are marked `sequence_parallel`, norms among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.mcore.hf.load import layer_numbers
from ctpo_megatron.models.adapters import ADAPTER, WEIGHT, AdaptedTensor, adapted_tensors
from ctpo_megatron.models.shape import HeadAttention, ModelShape
from ctpo_megatron.models.tensors import HfTensor, hf_tensors, parameter_key


class Pair(nn.Module):
    """A and B of one tensor of the model: this rank's pieces, B zero and A without values yet."""

    def __init__(self, adapted: AdaptedTensor, scale: float, tp_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.adapted, self.scale = adapted, scale
        self.a = _parameter(adapted.a, tp_size, dtype)
        self.b = _parameter(adapted.b, tp_size, dtype)

    def delta(self) -> Tensor:
        """s B A, float32: what the pair adds to this rank's piece of the tensor."""
        return (self.b.detach().float() @ self.a.detach().float()).mul_(self.scale)


def _parameter(tensor: HfTensor, tp_size: int, dtype: torch.dtype) -> nn.Parameter:
    dim = tensor.cut.dim
    size = [length // tp_size if axis == dim else length for axis, length in enumerate(tensor.shape)]
    parameter = nn.Parameter(torch.zeros(size, dtype=dtype))
    if dim is None:
        parameter.sequence_parallel = tp_size > 1  # type: ignore[attr-defined]  # megatron's own mark
    else:
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    return parameter


class LinearAdapter(nn.Module):
    """The pairs of one of megatron's linear layers, each a child of its projection's name.

    `tensors`: those that the layer's weight is made of; `groups`: of queries on this rank, where their keys and values follow.
    """

    def __init__(self, tensors: Sequence[HfTensor], pairs: dict[str, Pair], groups: int, eps: float, tp_group: Any) -> None:
        super().__init__()
        self.enabled = True
        self.by_column = tensors[0].cut.dim == 1
        self.groups = groups if tensors[0].cut.join == "grouped" else 0
        self.eps, self.tp_group = eps, tp_group
        cut = 1 if self.by_column else tp_group.size()
        self.outputs = [(pairs.get(tensor.name), tensor.shape[0] // cut) for tensor in tensors]
        self.pairs = list(pairs.values())
        for pair in self.pairs:
            self.add_module(_target(pair.adapted.base), pair)

    def forward(self, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """What is added to the output of the layer for the input x [T, ..., in]. `norm`: weight of a norm within the layer."""
        if norm is not None:
            x = F.rms_norm(x, norm.shape, norm, self.eps)
        inner = F.linear(x, torch.cat([pair.a for pair in self.pairs]))
        if self.tp_group.size() > 1:
            if self.by_column:
                inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
            else:
                inner = gather_from_sequence_parallel_region(inner, group=self.tp_group)
        scaled = iter((inner * self.pairs[0].scale).chunk(len(self.pairs), dim=-1))
        parts = [
            inner.new_zeros(*inner.shape[:-1], rows) if pair is None else F.linear(next(scaled), pair.b)
            for pair, rows in self.outputs
        ]
        if self.groups:
            return torch.cat([part.unflatten(-1, (self.groups, -1)) for part in parts], dim=-1).flatten(-2)
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def _target(base: HfTensor) -> str:
    return base.name.removesuffix(WEIGHT).rpartition(".")[2]


def _add(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None] | None:
    """A forward hook of the layer."""
    if not linear.adapter.enabled:
        return None
    result, bias = output
    return result + linear.adapter(inputs[0], getattr(linear, "layer_norm_weight", None)), bias


def add_adapters(model: Any, shape: ModelShape, adapter: LoraConfig, dtype: torch.dtype, tp_group: Any) -> None:
    """Freeze a GPTModel and give its linear layers their adapters."""
    model.requires_grad_(False)
    adapted = {each.base.name: each for each in adapted_tensors(shape, adapter)}
    by_key: dict[str, list[HfTensor]] = {}
    for tensor in hf_tensors(shape):
        by_key.setdefault(tensor.key, []).append(tensor)
    attention, tp_size = shape.attention, tp_group.size()
    groups = attention.num_kv_heads // tp_size if isinstance(attention, HeadAttention) else 0
    layers = layer_numbers(model)
    for name, linear in list(model.named_modules()):
        tensors = by_key.get(parameter_key(name + WEIGHT, layers, 0), [])
        mine = [adapted[tensor.name] for tensor in tensors if tensor.name in adapted]
        if mine:
            pairs = {each.base.name: Pair(each, adapter.scale, tp_size, dtype) for each in mine}
            linear.add_module(ADAPTER, LinearAdapter(tensors, pairs, groups, shape.rms_eps, tp_group))
            linear.register_forward_hook(_add)
    if model.pre_process and model.config.recompute_granularity == "full":
        # what is computed again without gradients takes part in the backward pass only if an input of it does
        model.embedding.register_forward_hook(lambda _module, _inputs, hidden: hidden.requires_grad_(torch.is_grad_enabled()))


def linear_adapters(models: Iterable[nn.Module]) -> Iterator[LinearAdapter]:
    """All adapters of this rank's part of the model, in its order."""
    for model in models:
        yield from (module for module in model.modules() if isinstance(module, LinearAdapter))


def adapter_pairs(models: Iterable[nn.Module]) -> Iterator[Pair]:
    """Their pairs; none where all weights are trained."""
    for adapter in linear_adapters(models):
        yield from adapter.pairs


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
