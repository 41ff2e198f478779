"""How the shards of a checkpoint reach the disk: with torch's own writer, from threads of this process.

Megatron-Core 0.16.1's writer forks a process per file and waits for it without bound. A Ray actor runs threads that do not
survive a fork, and a child that the kernel kills for its memory would be waited for forever. The files are the same
(`torch_dist`), so Megatron's reader reads them. On failure torch tells every rank, and none is left waiting.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

THREADS = 2  # writing at a time, per rank


class ThreadedSave(SaveShardedStrategy):
    """Saves in the format `torch_dist`, version 1."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects go into the same files as tensors."""
        return True

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Write this rank's shards."""
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(renamed, is_loading=False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, single_file_per_rank=False, thread_count=THREADS),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_strategy() -> SaveShardedStrategy:
    """`ThreadedSave` with the replicas of data parallelism sharing the work."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(ThreadedSave(), group)
