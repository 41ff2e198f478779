"""How products with weights are computed on CPUs in float32: as the processor's library computes them fastest for a few rows.

SGLang 0.5.23 keeps the weight of a linear layer as [outputs, inputs], row after row, and calls `torch.nn.functional.linear`. For
the few rows of a step that decodes, libraries copy the weight into the other order first. Here the weight keeps its shape and
lies in memory input after input, as they read it. MKL takes no AVX-512 on processors of other makers than Intel; where
these have it, oneDNN computes the product. docs/bench_rollout.md has what either gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

from ctpo_megatron.kernels.cpu.linear import pays, product, takes

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

METHOD = "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod"


def register() -> None:
    """Call it before `load_plugins`, which applies what is registered. Does nothing where torch sees a CUDA device."""
    if torch.cuda.is_available():
        return
    if torch.backends.mkl.is_available():
        HookRegistry.register(f"{METHOD}.process_weights_after_loading", lie_by_inputs, HookType.AFTER)
    if pays():
        HookRegistry.register(f"{METHOD}.apply", by_onednn, HookType.AROUND)


def lie_by_inputs(_result: None, _method: UnquantizedLinearMethod, layer: Any) -> None:
    """Let the weight [outputs, inputs] of a layer lie in memory input after input. Its shape and numbers stay."""
    weight = layer.weight
    if weight.dtype == torch.float32 and weight.dim() == 2:
        weight.data = weight.data.t().contiguous().t()


def by_onednn(linear: Any, method: UnquantizedLinearMethod, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x` [..., inputs] times the weight of a layer, plus `bias`, by oneDNN where the numbers are float32 and many."""
    return product(x, layer.weight, bias) if takes(x, layer.weight) else linear(method, layer, x, bias)
