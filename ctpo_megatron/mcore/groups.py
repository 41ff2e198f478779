"""Megatron-Core's process groups and random states."""

from __future__ import annotations

from megatron.core import parallel_state, tensor_parallel

from ctpo_megatron.config.model import ParallelConfig


def init_parallel_groups(parallel: ParallelConfig, seed: int, timeout_minutes: int) -> None:
    """Create megatron's process groups and random states. torch.distributed must be initialised."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
