"""Megatron's linear layers, whose products are computed on CPUs in float32 by the fastest library (`kernels.cpu.linear`)."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from ctpo_megatron.kernels.cpu.linear import linear, takes

# What megatron does between the products of a pass: gather parts of a sequence, add up gradients, put them off. It keeps those.
_BETWEEN = ("sequence_parallel", "allreduce_dgrad", "gradient_accumulation_fusion", "grad_output_buffer")


class _Multiplying:
    """The product of a linear layer of megatron's, which is the next base."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        if not takes(input, weight) or any(options.get(name) for name in _BETWEEN):
            return super()._forward_impl(input, weight, bias=bias, **options)  # type: ignore[misc]
        return linear(input, weight) if bias is None else linear(input, weight) + bias


class ColumnLinear(_Multiplying, ColumnParallelLinear):
    """megatron's, whose weight's outputs are cut."""


class RowLinear(_Multiplying, RowParallelLinear):
    """megatron's, whose weight's inputs are cut."""


# megatron 0.16.1 takes none but its own there, and `LatentSelfAttention` puts whole ones into their places
_CHECKED = ("linear_q_down_proj", "linear_kv_down_proj")
_OWN = {ColumnParallelLinear: ColumnLinear, RowParallelLinear: RowLinear}


def with_own_linears(spec: Any) -> Any:
    """Returns a layer's spec, or a part of one, with these in the places of megatron's."""
    if isinstance(spec, type):
        return _OWN.get(spec, spec)
    if isinstance(spec, ModuleSpec):
        return replace(spec, module=with_own_linears(spec.module), submodules=with_own_linears(spec.submodules))
    if is_dataclass(spec) and not isinstance(spec, type):
        parts = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in _CHECKED}
        return replace(spec, **{name: with_own_linears(part) for name, part in parts.items()})
    return spec
