"""Lets an unpatched SGLang compute with weights in fp8 blocks (`engine.fp8`) on hosts without a GPU.

SGLang 0.5.23 loads such weights anywhere and computes with them by kernels of Triton, DeepGEMM or, on CPUs, AMX. Elsewhere the
first product fails. Two hooks of SGLang's plugin framework compute the same in torch: activations go through fp8 as on GPUs, and
sums are float32. It is slow, and there for trying out and for tests: each product reads its weight into float32 anew.
tests/integration/test_fp8.py tells when this is no longer needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

from ctpo_megatron.engine import fp8

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod, Fp8MoEMethod

MODULE = "sglang.srt.layers.quantization.fp8"


def register() -> None:
    """Call it before `load_plugins`, which applies what is registered. Does nothing where torch sees a CUDA device."""
    if not torch.cuda.is_available():
        HookRegistry.register(f"{MODULE}.Fp8LinearMethod.apply", linear, HookType.REPLACE)
        HookRegistry.register(f"{MODULE}.Fp8MoEMethod.apply", experts, HookType.REPLACE)


def linear(_method: Fp8LinearMethod, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x` [..., inputs] times the weight of a layer, plus `bias`."""
    out = fp8.product(x.reshape(-1, x.shape[-1]), layer.weight, layer.weight_scale_inv)
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


def experts(method: Fp8MoEMethod, layer: Any, dispatch_output: Any) -> Any:
    """Returns the gated sum of what the chosen experts make of each token, in SGLang's own wrapping."""
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    config, x = method.moe_runner_config, dispatch_output.hidden_states
    if config.activation != "silu" or config.apply_router_weight_on_input:
        raise NotImplementedError("experts in fp8 on a CPU: only gated silu, with gates on the outputs")
    gates, chosen, _ = dispatch_output.topk_output
    total = torch.zeros(x.shape)
    for expert in chosen.unique().tolist():
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        made = fp8.product(x[rows], layer.w13_weight[expert], layer.w13_weight_scale_inv[expert])
        gate, up = made.chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        out = fp8.product(inner, layer.w2_weight[expert], layer.w2_weight_scale_inv[expert])
        total.index_add_(0, rows, out.float() * gates[rows, places, None].float())
    return StandardCombineInput(hidden_states=total.to(x.dtype))  # a model that scales them does so itself where there is no CUDA
