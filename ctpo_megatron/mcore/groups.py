"""Megatron-Core's process groups and random states."""

from __future__ import annotations

from megatron.core import parallel_state, tensor_parallel

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.models.coords import RankCoords


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


def current_coords(expert_layers: tuple[int, ...] = ()) -> RankCoords:
    """This rank's place, from megatron's process groups. `expert_layers`: those that its routers are of, where that matters."""
    return RankCoords(
        dp_rank=parallel_state.get_data_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        expert_layers=expert_layers,
    )


def destroy_parallel_groups() -> None:
    """Forget megatron's process groups, so that the store they met at closes with torch's own.

    Megatron-Core 0.16.1 keeps one of them; its store would stay at its port, and what this process starts there next
    would read the old keys and wait for ranks that are gone. tests/dist/test_host.py tells when it no longer does.
    """
    parallel_state.destroy_model_parallel()
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
