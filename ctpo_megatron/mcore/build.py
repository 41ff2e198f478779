"""From a model's shape to Megatron-Core's process groups, model, optimizer and learning-rate schedule.

Call `prepare_host` before importing this module, and everything here inside `megatron_region`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import ConfigError, ModelError
from ctpo_megatron.mcore.hf_config import ModelShape
from ctpo_megatron.mcore.spec import layer_spec, use_transformer_engine


def init_parallel_groups(parallel: ParallelConfig, seed: int, timeout_minutes: int) -> None:
    """Create megatron's process groups and random states. torch.distributed must be initialised."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,  # experts are split by ep; gloo cannot gather the uneven shares that more would bring
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def transformer_config(
    shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, recompute: bool
) -> TransformerConfig:
    """megatron's description of the model. No dropout."""
    fused = use_transformer_engine(device)
    options: dict[str, Any] = _experts(shape, fused) if shape.is_moe else {}
    if recompute:
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        qk_layernorm=shape.qk_norm,
        add_qkv_bias=shape.qkv_bias,
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


def _experts(shape: ModelShape, fused: bool) -> dict[str, Any]:
    if shape.norm_topk_prob and shape.experts_top_k == 1:
        raise ModelError("num_experts_per_tok = 1 with norm_topk_prob makes every gate 1 and the router untrainable.")
    return {
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.experts_top_k,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        # softmax over the chosen experts equals softmax over all of them, normalised over the chosen
        "moe_router_pre_softmax": not shape.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if shape.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": shape.moe_aux_loss_coeff,
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": fused,
    }


def build_model(
    shape: ModelShape,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    recompute: bool = False,
    trainable: bool = True,
) -> list[torch.nn.Module]:
    """This rank's part of the model, with weights not yet loaded, as the list of one chunk that megatron's functions take.

    `trainable` wraps it in megatron's DistributedDataParallel, which owns the gradients.
    """
    config = transformer_config(shape, parallel, dtype, device, recompute)
    model: torch.nn.Module = GPTModel(
        config,
        layer_spec(config, device),
        vocab_size=shape.padded_vocab_size(parallel.tp),
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )
    if shape.rope_scaling is not None:
        rope = model.rotary_pos_emb
        # the constructor takes only `factor`; the method behind it takes all four numbers
        rope.inv_freq = rope._apply_scaling(rope.inv_freq, **shape.rope_scaling)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # Each tensor-parallel rank runs its own tokens through whole experts, so their gradients are to be summed over the
            # expert-data-parallel group. megatron's layers ask for that only where ep > 1.
            parameter.allreduce = False
    model.to(device)
    if config.bf16:
        model = Float16Module(config, model)
    if not trainable:
        return [model]
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model = DistributedDataParallel(config, ddp, model)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = model.no_sync
    return [model]


def build_optimizer(models: list[torch.nn.Module], config: OptimizerConfig, dtype: torch.dtype) -> MegatronOptimizer:
    """AdamW whose state is sharded over the data-parallel ranks. Call it after the weights were loaded: it copies bf16 ones."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(settings, models, use_gloo_process_groups=False)


def build_schedule(optimizer: MegatronOptimizer, config: OptimizerConfig, total_steps: int | None) -> OptimizerParamScheduler:
    """Linear warm-up, then a constant rate or a cosine that would reach 0 one step after `total_steps`.

    Advance it before each optimizer step: step k of w warm-up steps then runs at lr * k / w.
    """
    if config.schedule == "cosine" and (total_steps is None or total_steps < config.warmup_steps):
        raise ConfigError(
            f"optimizer.schedule is cosine with optimizer.warmup_steps = {config.warmup_steps}, "
            f"but the run has {total_steps} optimizer steps; it needs at least as many as the warm-up."
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=0.0,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps or 0, config.warmup_steps) + 1,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
