"""From a model's shape to Megatron-Core's description of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.errors import ModelError
from ctpo_megatron.mcore.model.spec import use_transformer_engine
from ctpo_megatron.mcore.shape import Experts, ModelShape

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(
    shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, recompute: str
) -> TransformerConfig:
    """megatron's description of the model. No dropout."""
    fused = use_transformer_engine(device)
    options: dict[str, Any] = _experts(shape.experts, fused) if shape.experts else {}
    options |= _RECOMPUTE[recompute]
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.attention.num_kv_heads,
        kv_channels=shape.attention.head_dim,
        qk_layernorm=shape.attention.qk_norm,
        add_qkv_bias=shape.attention.qkv_bias,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # weights come from a file; megatron must still "initialise" them, because that is when it marks which are split
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.tp > 1,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,
        variable_seq_lengths=True,  # packs differ in length
        moe_token_dispatcher_type="alltoall",  # the one that allows it
        cuda_graph_scope=[],
        deallocate_pipeline_outputs=parallel.pp > 1,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        gradient_accumulation_fusion=False,
        **options,
    )


def _leave(_weight: torch.Tensor) -> None:
    """An initialisation that does nothing."""


def _experts(experts: Experts, fused: bool) -> dict[str, Any]:
    if experts.normalise and experts.top_k == 1:
        raise ModelError("num_experts_per_tok = 1 with norm_topk_prob makes every gate 1 and the router untrainable.")
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        # softmax over the chosen experts equals softmax over all of them, normalised over the chosen
        "moe_router_pre_softmax": not experts.normalise,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if experts.aux_loss_coeff else "none",
        "moe_aux_loss_coeff": experts.aux_loss_coeff,
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": fused,
    }
