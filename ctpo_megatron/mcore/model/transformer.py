"""From a model's shape to Megatron-Core's description of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.config.train import Fp8Config
from ctpo_megatron.mcore.fp8 import fp8_options
from ctpo_megatron.mcore.model.parts import attention_options, config_class, experts_options, set_yarn
from ctpo_megatron.mcore.model.spec import use_transformer_engine
from ctpo_megatron.models.shape import LatentAttention, ModelShape


def transformer_config(
    shape: ModelShape,
    parallel: ParallelConfig,
    moe: MoeConfig,
    dtype: torch.dtype,
    device: torch.device,
    recompute: str,
    fp8: Fp8Config | None = None,
) -> TransformerConfig:
    """megatron's description of the model. No dropout. `fp8` has been checked (`mcore.fp8`)."""
    fused = use_transformer_engine(device)
    options = attention_options(shape, fused)
    options |= experts_options(shape.experts, moe, fused) if shape.experts else {}
    options |= _recompute(recompute, shape, fused) | fp8_options(fp8)
    config = config_class(shape)(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
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
        disable_bf16_reduced_precision_matmul=True,  # cuBLAS then adds the parts of a long sum in float32
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.tp > 1,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        variable_seq_lengths=True,  # micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # the one that allows it
        cuda_graph_scope=[],
        # megatron frees what it sends before it has waited for it, which only an allocator that follows CUDA's streams survives
        deallocate_pipeline_outputs=parallel.pp > 1 and device.type == "cuda",
        # one message per call and direction: two between the same two stages in one batch would be taken for one another
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        bias_activation_fusion=fused,
        use_te_activation_func=not fused and not shape.experts,  # one of our own, see `model.compiled`
        bias_dropout_fusion=fused,
        gradient_accumulation_fusion=False,
        **options,
    )
    set_yarn(config, shape)
    return config


def _leave(_weight: torch.Tensor) -> None:
    """An initialisation that does nothing."""


def _recompute(mode: str, shape: ModelShape, fused: bool) -> dict[str, Any]:
    """megatron's options for `train.recompute`.

    `selective` computes again what is large in memory and cheap in arithmetic: the portable attention, which keeps scores
    where it is not compiled, or the experts' activations, the norms before them and MLA's up-projections, which megatron does
    with TransformerEngine only.
    """
    if mode == "none":
        return {}
    if mode == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = {
        "core_attn": not fused,
        "mla_up_proj": fused and isinstance(shape.attention, LatentAttention),
        "layernorm": fused and shape.experts is not None,
        "moe_act": fused and shape.experts is not None,
    }
    chosen = [name for name, wanted in modules.items() if wanted]
    return {"recompute_granularity": "selective", "recompute_modules": chosen or ["core_attn"]}
