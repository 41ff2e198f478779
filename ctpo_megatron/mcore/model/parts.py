"""A model's attention, position embedding and mixtures in the words of Megatron-Core's configuration."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from ctpo_megatron.config.model import MoeConfig
from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.shape import Experts, HeadAttention, LatentAttention, Llama3Scaling, ModelShape, Rope, YarnScaling


def config_class(shape: ModelShape) -> type[TransformerConfig]:
    """The configuration that has the fields of `attention_options`."""
    return MLATransformerConfig if isinstance(shape.attention, LatentAttention) else TransformerConfig


def attention_options(shape: ModelShape, fused: bool) -> dict[str, Any]:
    """Fields of attention; those of latent attention hold its position embedding too."""
    attention = shape.attention
    if isinstance(attention, LatentAttention):
        return _latent_attention(attention, shape.num_heads) | _latent_rope(shape.rope)
    return {
        "num_query_groups": attention.num_kv_heads,
        "kv_channels": attention.head_dim,
        "qk_layernorm": attention.qk_norm,
        "add_qkv_bias": attention.qkv_bias,
        # the fused kernel for packed sequences drops yarn's factor
        "apply_rope_fusion": fused and not isinstance(shape.rope.scaling, YarnScaling),
    }


def _latent_attention(attention: LatentAttention, heads: int) -> dict[str, Any]:
    return {
        "num_query_groups": heads,
        "q_lora_rank": attention.q_rank,
        "kv_lora_rank": attention.kv_rank,
        "qk_head_dim": attention.nope_dim,
        "qk_pos_emb_head_dim": attention.rope_dim,
        "v_head_dim": attention.value_dim,
        "qk_layernorm": True,  # of both latents
        "apply_rope_fusion": False,
    }


def _latent_rope(rope: Rope) -> dict[str, Any]:
    scaling = rope.scaling
    if scaling is None:
        return {"rope_type": "rope", "rotary_base": rope.theta, "rotary_scaling_factor": 1.0}
    if not isinstance(scaling, YarnScaling):
        raise ModelError(f"latent attention with {type(scaling).__name__} of its position embedding; allowed are YaRN and none")
    return {
        "rope_type": "yarn",
        "rotary_base": rope.theta,
        "rotary_scaling_factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_positions,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    }


def set_yarn(config: TransformerConfig, shape: ModelShape) -> None:
    """YaRN of attention with keys per head: megatron reads attributes that its configuration has no fields for."""
    scaling = shape.rope.scaling
    if not isinstance(scaling, YarnScaling) or not isinstance(shape.attention, HeadAttention):
        return
    config.yarn_rotary_scaling_factor = scaling.factor
    config.yarn_original_max_position_embeddings = scaling.original_max_positions
    config.yarn_beta_fast = scaling.beta_fast
    config.yarn_beta_slow = scaling.beta_slow
    config.yarn_mscale = scaling.mscale
    config.yarn_mscale_all_dim = scaling.mscale_all_dim
    config.yarn_correction_range_round_to_int = True


def rope_options(shape: ModelShape) -> dict[str, Any]:
    """Arguments of GPTModel; latent attention has a position embedding of its own in each layer and passes these over."""
    is_yarn = isinstance(shape.rope.scaling, YarnScaling) and isinstance(shape.attention, HeadAttention)
    return {
        "position_embedding_type": "yarn" if is_yarn else "rope",
        "rotary_base": shape.rope.theta,
        "rotary_percent": shape.rope.fraction,
    }


def scale_llama3(model: GPTModel, rope: Rope) -> None:
    """Llama 3.1's bands. The constructor takes only `factor`; the method behind it takes all four numbers."""
    if isinstance(rope.scaling, Llama3Scaling):
        embedding = model.rotary_pos_emb
        embedding.inv_freq = embedding._apply_scaling(
            embedding.inv_freq,
            factor=rope.scaling.factor,
            low_freq_factor=rope.scaling.low_freq_factor,
            high_freq_factor=rope.scaling.high_freq_factor,
            original_max_position_embeddings=rope.scaling.original_max_positions,
        )


def experts_options(experts: Experts, moe: MoeConfig, fused: bool) -> dict[str, Any]:
    """Fields of the mixtures. The load-balancing loss is over a micro-batch's tokens, sigmoid scores normalised."""
    if experts.normalise and experts.top_k == 1:
        raise ModelError("num_experts_per_tok = 1 with norm_topk_prob makes every gate 1 and the router untrainable.")
    aux = experts.aux_loss_coeff if moe.aux_loss_coeff is None else moe.aux_loss_coeff
    limited = experts.groups_kept < experts.groups
    return {
        "num_moe_experts": experts.count,
        "moe_layer_freq": [int(is_mixture) for is_mixture in experts.layers],
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_router_score_function": experts.score,
        # softmax over the chosen experts equals softmax over all of them, normalised over the chosen
        "moe_router_pre_softmax": experts.score == "softmax" and not experts.normalise,
        "moe_router_topk_scaling_factor": None if experts.scale == 1.0 else experts.scale,
        "moe_router_num_groups": experts.groups if limited else None,
        "moe_router_group_topk": experts.groups_kept if limited else None,
        "moe_router_enable_expert_bias": experts.bias,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if aux else "none",
        "moe_aux_loss_coeff": aux,
        "moe_z_loss_coeff": moe.z_loss_coeff or None,
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": fused,
    }


def keep_biases_precise(model: torch.nn.Module) -> None:
    """Routers' biases in float32, as they are in files, after the rest was made 16-bit."""
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias = module.expert_bias.float()
