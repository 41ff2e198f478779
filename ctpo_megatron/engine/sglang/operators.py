"""Operators of SGLang's models on CPUs in float32, each one call of a compiled function.

SGLang 0.5.23 writes them out in elementary operations where no kernel of its own runs. With small models the calls themselves are
what a step costs. What is not covered here is left to SGLang's own forms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctpo_megatron.engine.sglang import kernels
from ctpo_megatron.engine.sglang.lanes import LANES
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
    rows, weight, out = _flat(x), _flat(self.weight), torch.empty(x.shape)
    if residual is None:
        kernels.rms_norm(rows, rows, weight, self.variance_epsilon, False, rows, _flat(out))
        return out
    summed = torch.empty(x.shape)
    kernels.rms_norm(rows, _flat(residual), weight, self.variance_epsilon, True, _flat(summed), _flat(out))
    return out, summed


def silu_and_mul(self: SiluAndMul, x: Tensor) -> Tensor:
    """silu of the first half of the last dimension, times the second."""
    size = x.shape[-1] // 2
    if x.dtype != torch.float32 or size % LANES:
        return self.forward_native(x)
    out = torch.empty(*x.shape[:-1], size)
    kernels.silu_and_mul(_flat(x), _flat(out), size)
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
    )
    if not plain:
        return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    turns, where = _flat(self.cos_sin_cache), positions.flatten().long().numpy()
    turned = torch.empty(query.shape), torch.empty(key.shape)
    for x, out in zip((query, key), turned, strict=True):
        kernels.rotary(_flat(x), turns, where, self.head_size, _flat(out))
    return turned


def _flat(x: Tensor) -> NDArray[np.float32]:
    """Returns the numbers of `x` in one row; where it is contiguous they are its own."""
    return x.detach().reshape(-1).numpy()


def register() -> None:
    """Let SGLang's operators call these where the platform of `engine.sglang.platform` serves."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    for operator, function in ((RMSNorm, rms_norm), (SiluAndMul, silu_and_mul), (RotaryEmbedding, rotary)):
        BaseFusedOp.register_oot_forward(operator, function, DISPATCH_KEY)
