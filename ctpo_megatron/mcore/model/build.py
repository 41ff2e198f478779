"""A rank's part of the model, on its device, wrapped for training.

Call `prepare_host` before importing this module, and everything here inside `megatron_region`.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.config.critic import CriticConfig
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.config.train import Fp8Config
from ctpo_megatron.mcore.fp8 import check_fp8
from ctpo_megatron.mcore.model.head import HiddenGPTModel
from ctpo_megatron.mcore.model.lora import add_adapters
from ctpo_megatron.mcore.model.parts import keep_biases_precise, rope_options, scale_llama3
from ctpo_megatron.mcore.model.routing import with_replay
from ctpo_megatron.mcore.model.spec import layer_spec
from ctpo_megatron.mcore.model.transformer import transformer_config
from ctpo_megatron.mcore.model.value_head import add_value_head
from ctpo_megatron.models.rules import overlap_of
from ctpo_megatron.models.shape import ModelShape

OVERLAPPED_BUCKET: int | None = None  # parameters that are reduced, or gathered, together beside a pass; None: megatron's number


def build_model(
    shape: ModelShape,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    moe: MoeConfig | None = None,
    recompute: str = "none",
    fp8: Fp8Config | None = None,
    trainable: bool = True,
    adapter: LoraConfig | None = None,
    critic: CriticConfig | None = None,
) -> list[torch.nn.Module]:
    """This rank's part of the model, with weights not yet loaded, as the list of chunks that megatron's functions take.

    There is one chunk, or `parallel.vpp` of them where the pipeline is interleaved. `trainable` wraps each in megatron's
    DistributedDataParallel, which owns the gradients. With `adapter` only adapters have some.
    With `critic` the last chunk has a value head. Raises ConfigError where `fp8` needs what is not there.
    """
    check_fp8(fp8, device, dtype, recompute=recompute, mixture=shape.num_experts > 0)
    config = transformer_config(shape, parallel, moe or MoeConfig(), dtype, device, recompute, fp8)
    stages = range(parallel.vpp) if parallel.vpp > 1 else [None]
    chunks = [_chunk(shape, parallel, config, device, vp_stage, adapter, critic) for vp_stage in stages]
    if not trainable:
        return chunks
    overlap = overlap_of(shape, parallel, adapted=adapter is not None)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
        bucket_size=OVERLAPPED_BUCKET if overlap.grad_reduce else None,
    )
    chunks = [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]
    config.finalize_model_grads_func = finalize_model_grads
    no_sync = [chunk.no_sync for chunk in chunks]
    config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return chunks


def _chunk(
    shape: ModelShape,
    parallel: ParallelConfig,
    config: TransformerConfig,
    device: torch.device,
    vp_stage: int | None,
    adapter: LoraConfig | None,
    critic: CriticConfig | None,
) -> torch.nn.Module:
    """This pipeline stage's layers, or those of its chunk `vp_stage`, with what stands before the first and after the last."""
    place = {"ignore_virtual": False, "vp_stage": vp_stage}
    model: torch.nn.Module = HiddenGPTModel(
        config,
        with_replay(layer_spec(config, device, vp_stage)),
        vocab_size=shape.padded_vocab_size(parallel.tp),
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=shape.tie_embeddings,
        vp_stage=vp_stage,
        **rope_options(shape),
    )
    scale_llama3(model, shape.rope)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # Experts are spread over ranks by ep and etp, not by tp: their gradients are to be summed over the
            # expert-data-parallel group. megatron's layers ask for that only where ep > 1.
            parameter.allreduce = False  # type: ignore[attr-defined]  # megatron's own mark
    if adapter is not None:
        add_adapters(model, shape, adapter, config.params_dtype)
    if critic is not None and model.post_process:
        add_value_head(model, critic.weights, parallel_state.get_tensor_model_parallel_group())
    model.to(device)
    if config.bf16:
        model = Float16Module(config, model)
        keep_biases_precise(model)
    return model
