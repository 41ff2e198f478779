"""Operators of SGLang's models on CPUs in float32, each one call of a compiled function.

SGLang 0.5.23 writes them out in elementary operations where no kernel of its own runs. With small models the calls themselves are
what a step costs. What is not covered here is left to SGLang's own forms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctpo_megatron.engine.sglang import kernels
from ctpo_megatron.engine.sglang.platform import DISPATCH_KEY
from ctpo_megatron.kernels.cpu import rows as compiled
from ctpo_megatron.kernels.cpu.addresses import address
from ctpo_megatron.kernels.cpu.lanes import LANES

if TYPE_CHECKING:
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding


def rms_norm(
    self: RMSNorm,
    x: Tensor,
    residual: Tensor | None = None,
    post_residual_addition: Tensor | None = None,
    quant_linear: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the norm of `x`, or of `x + residual` and that sum with it."""
    plain = (
        x.dtype == self.weight.dtype == torch.float32
        and self.variance_size_override is None
        and self.override_orig_dtype is None
        and post_residual_addition is None
        and x.shape[-1] == self.hidden_size == len(self.weight)
        and self.hidden_size % LANES == 0
    )
    if not plain:
        return self.forward_native(x, residual, post_residual_addition, quant_linear)
    size, out = self.hidden_size, torch.empty(x.shape)
    x, at_x = address(x)
    rows, weight, at_out = x.numel() // size, self.weight.data_ptr(), out.data_ptr()
    if residual is None:
        compiled.rms_norm(at_x, at_x, weight, self.variance_epsilon, False, at_x, at_out, rows, size)
        return out
    residual, at_residual = address(residual)
    summed = torch.empty(x.shape)
    compiled.rms_norm(at_x, at_residual, weight, self.variance_epsilon, True, summed.data_ptr(), at_out, rows, size)
    return out, summed


def silu_and_mul(self: SiluAndMul, x: Tensor) -> Tensor:
    """silu of the first half of the last dimension, times the second."""
    size = x.shape[-1] // 2
    if x.dtype != torch.float32 or size % LANES:
        return self.forward_native(x)
    out = torch.empty(*x.shape[:-1], size)
    x, at_x = address(x)
    compiled.silu_and_mul(at_x, out.data_ptr(), out.numel() // size, size)
    return out


def rotary(
    self: RotaryEmbedding,
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    offsets: Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[Tensor, Tensor]:
    """Returns query and key [tokens, heads * dim], turned by their positions, the whole of each head."""
    plain = (
        offsets is None
        and fused_set_kv_buffer_arg is None
        and self.is_neox_style
        and self.rotary_dim == self.head_size
        and not hasattr(self, "sin_cos_cache")
        and query.dtype == key.dtype == self.cos_sin_cache.dtype == torch.float32
        and self.cos_sin_cache.is_contiguous()
    )
    if not plain:
        return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    turns, where = self.cos_sin_cache, positions.flatten().long()
    turned = torch.empty(query.shape), torch.empty(key.shape)
    for x, out in zip((query, key), turned, strict=True):
        x = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(len(where), -1)
        given = (x.data_ptr(), x.stride(0), turns.data_ptr(), len(turns), where.data_ptr(), len(where))
        kernels.rotary(*given, x.shape[1], self.head_size, out.data_ptr())
    return turned


def register() -> None:
    """Let SGLang's operators call these where the platform of `engine.sglang.platform` serves."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    for operator, function in ((RMSNorm, rms_norm), (SiluAndMul, silu_and_mul), (RotaryEmbedding, rotary)):
        BaseFusedOp.register_oot_forward(operator, function, DISPATCH_KEY)
