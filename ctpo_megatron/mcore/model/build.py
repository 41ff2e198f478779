"""A rank's part of the model, on its device, wrapped for training.

Call `prepare_host` before importing this module, and everything here inside `megatron_region`.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.mcore.model.spec import layer_spec
from ctpo_megatron.mcore.model.transformer import transformer_config
from ctpo_megatron.mcore.shape import Llama3Scaling, ModelShape


def build_model(
    shape: ModelShape,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    recompute: str = "none",
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
        rotary_base=shape.rope.theta,
    )
    if shape.rope.scaling is not None:
        _scale_rope(model.rotary_pos_emb, shape.rope.scaling)
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


def _scale_rope(rope: RotaryEmbedding, scaling: Llama3Scaling) -> None:
    """The constructor takes only `factor`; the method behind it takes all four numbers."""
    rope.inv_freq = rope._apply_scaling(
        rope.inv_freq,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_max_positions,
    )
