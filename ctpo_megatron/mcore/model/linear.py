"""Megatron's linear layers, whose products are computed on CPUs in float32 by the fastest library (`kernels.cpu.linear`)."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from ctpo_megatron.kernels.cpu.linear import linear, takes


def _alone(input: Tensor, weight: Tensor, options: dict[str, Any]) -> bool:
    """Returns whether nothing but a product is asked for: no parts of a sequence to gather, no gradient to put off or add up."""
    asked = ("sequence_parallel", "gradient_accumulation_fusion", "grad_output_buffer")
    return takes(input, weight) and not any(options.get(name) for name in asked)


class ColumnLinear(ColumnParallelLinear):
    """megatron's, whose weight's outputs are cut."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        if not _alone(input, weight, options):
            return super()._forward_impl(input, weight, bias=bias, **options)
        if options["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=options["tp_group"])
        return linear(input, weight) if bias is None else linear(input, weight) + bias


class RowLinear(RowParallelLinear):
    """megatron's, whose weight's inputs are cut."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        if not _alone(input, weight, options):
            return super()._forward_impl(input, weight, bias=bias, **options)
        return linear(input, weight) if bias is None else linear(input, weight) + bias


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
