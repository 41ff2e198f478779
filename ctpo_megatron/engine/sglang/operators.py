"""Operators of SGLang's models on CPUs, each in as few calls of PyTorch as it takes.

SGLang 0.5.23 writes them out in elementary operations where no kernel of its own runs. With small models the calls themselves are
what a step costs. What is not covered here is left to SGLang's own forms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ctpo_megatron.engine.sglang.platform import DISPATCH_KEY

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
    """The norm of `x`, or of `x + residual` and that sum with it, in float32: one call."""
    plain = (
        x.dtype == self.weight.dtype == torch.float32
        and self.variance_size_override is None
        and self.override_orig_dtype is None
        and post_residual_addition is None
        and x.shape[-1] == self.hidden_size
    )
    if not plain:
        return self.forward_native(x, residual, post_residual_addition, quant_linear)
    summed = x if residual is None else x + residual
    normed = functional.rms_norm(summed, (self.hidden_size,), self.weight, self.variance_epsilon)
    return normed if residual is None else (normed, summed)


def silu_and_mul(self: SiluAndMul, x: Tensor) -> Tensor:
    """silu of the first half of the last dimension, times the second."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def rotary(
    self: RotaryEmbedding,
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    offsets: Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[Tensor, Tensor]:
    """Query and key [tokens, heads * dim], turned by their positions: both together, and the whole of each head."""
    plain = (
        offsets is None
        and fused_set_kv_buffer_arg is None
        and self.is_neox_style
        and self.rotary_dim == self.head_size
        and not hasattr(self, "sin_cos_cache")
        and query.dtype == key.dtype == torch.float32
    )
    if not plain:
        return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    cos, sin = self.cos_sin_cache.index_select(0, positions.flatten()).float().unsqueeze(1).chunk(2, dim=-1)
    return _turned(query, cos, sin, self.head_size), _turned(key, cos, sin, self.head_size)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    first, second = x.view(len(cos), -1, dim).chunk(2, dim=-1)
    turned = torch.empty(len(cos), first.shape[1], dim)
    torch.addcmul(first * cos, second, sin, value=-1, out=turned[..., : dim // 2])
    torch.addcmul(second * cos, first, sin, out=turned[..., dim // 2 :])
    return turned.view(x.shape)


def register() -> None:
    """Let SGLang's operators call these where the platform of `engine.sglang.platform` serves."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    for operator, function in ((RMSNorm, rms_norm), (SiluAndMul, silu_and_mul), (RotaryEmbedding, rotary)):
        BaseFusedOp.register_oot_forward(operator, function, DISPATCH_KEY)
