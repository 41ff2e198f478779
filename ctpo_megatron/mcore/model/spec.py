"""Of which modules a transformer layer is made: TransformerEngine's on GPUs, plain torch elsewhere.

The two differ in parameter names: TransformerEngine fuses each norm into the linear layer after it
(`linear_qkv.layer_norm_weight`, `linear_kv_up_proj.layer_norm_weight`), and groups experts (`experts.linear_fc1.weight3`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from ctpo_megatron.mcore.model.attention import PackedAttention
from ctpo_megatron.mcore.model.compiled import RMSNorm, SwiGlu, TurnedSelfAttention
from ctpo_megatron.mcore.model.latent import LatentSelfAttention
from ctpo_megatron.mcore.model.linear import with_own_linears
from ctpo_megatron.mcore.transformer_engine import use_transformer_engine


def layer_spec(config: TransformerConfig, device: torch.device, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its chunk `vp_stage`, and the norm after them.

    A mixture of experts stands where `config.moe_layer_freq` has a 1, a dense MLP elsewhere.
    """
    if use_transformer_engine(device):
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage)
    layers = [_portable(layer, config) for layer in block.layer_specs]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _portable(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """megatron's local layer with own norms and linear layers, and attention that also does context parallelism and packing."""
    attention = layer.submodules.self_attention
    parts = replace(attention.submodules, core_attention=PackedAttention)
    if config.multi_latent_attention:
        parts = replace(parts, q_layernorm=RMSNorm, kv_layernorm=RMSNorm)
        attention = replace(attention, module=LatentSelfAttention)
    else:
        parts = replace(parts, q_layernorm=RMSNorm, k_layernorm=RMSNorm) if config.qk_layernorm else parts
        attention = replace(attention, module=TurnedSelfAttention)
    mlp = layer.submodules.mlp
    if config.use_te_activation_func:  # megatron's word for an activation that is a module
        mlp = replace(mlp, submodules=replace(mlp.submodules, activation_func=SwiGlu))
    own = replace(
        layer,
        submodules=replace(
            layer.submodules,
            input_layernorm=RMSNorm,
            self_attention=replace(attention, submodules=parts),
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
        ),
    )
    return with_own_linears(own)
