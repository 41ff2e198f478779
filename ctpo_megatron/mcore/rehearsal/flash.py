"""A stand-in for flash attention: what the kernel keeps and makes, without its arithmetic."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.mcore.model.attention import PackedAttention
from ctpo_megatron.parallel.gather import all_gather_single


class _Flash(torch.autograd.Function):
    """Keeps queries, keys, values, output and one float32 per head and token (arXiv 2205.14135), never scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        _gathered(key, group), _gathered(value, group)
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.group = group
        return output.flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, _output, sums = ctx.saved_tensors
        wholes = [_gathered(each, ctx.group) for each in (key, value)]
        grads = [torch.empty_like(whole) for whole in wholes]
        torch.empty_like(sums)  # of output times its gradient
        if ctx.group.size() > 1:
            parts = [torch.empty_like(key), torch.empty_like(value)]
            for part, whole in zip(parts, grads, strict=True):
                dist.reduce_scatter_tensor(part, whole, group=ctx.group)
            grads = parts
        return torch.empty_like(query), grads[0], grads[1], None


def _gathered(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Keys or values of all context-parallel ranks."""
    if group.size() == 1:
        return mine
    whole = mine.new_empty(group.size() * mine.shape[0], *mine.shape[1:])
    all_gather_single(whole, mine.contiguous(), group)
    return whole


class FlashStandIn(torch.nn.Module):
    """In the place of `PackedAttention`: the memory of TransformerEngine's attention, and the bytes that it moves over CP.

    TransformerEngine passes keys and values around the ring in pieces; here they are gathered, which moves as many bytes.
    """

    def __init__(self, attention: PackedAttention) -> None:
        super().__init__()
        self.cp_group = attention.cp_group

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_inputs: Any, **_options: Any) -> Tensor:
        """query [T, heads, d], key [T, groups, d], value [T, groups, e] of this rank; returns [T, heads * e]."""
        return _Flash.apply(query, key, value, self.cp_group)


def use_flash(models: list[torch.nn.Module]) -> None:
    """Put the stand-in into every attention of `models`."""
    for module in [each for model in models for each in model.modules()]:
        attention = getattr(module, "core_attention", None)
        if isinstance(attention, PackedAttention):
            module.core_attention = FlashStandIn(attention)
