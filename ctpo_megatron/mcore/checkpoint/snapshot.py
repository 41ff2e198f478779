"""A rank's part of a checkpoint as it is at one moment: copied to host memory, so that training may go on.

All collectives on megatron's groups happen here, in the caller's thread. What follows (`writer`) needs none of them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from ctpo_megatron.mcore.checkpoint import random_state
from ctpo_megatron.mcore.checkpoint.optimizer_state import optimizer_shards
from ctpo_megatron.mcore.checkpoint.trainables import model_shards

Place = tuple[str, tuple[int, ...] | None]  # name of a stored tensor or object, and where in the whole the shard begins


@dataclass
class Snapshot:
    """What this rank has to write; the model and the optimizer share nothing with it."""

    shards: dict[str, Any]  # torch's description, for its writer
    tensors: dict[Place, Tensor]  # the same shards as megatron describes them: what the disk is compared with
    objects: dict[Place, bytes]
    weights: set[str]  # names of the stored tensors that are the model's
    common: bytes  # what megatron does not cut up: settings of the optimizer
    random: bytes | None  # None: a checkpoint of weights only has no random states


def sharded_state(models: list[torch.nn.Module], optimizer: MegatronOptimizer | None, *, loading: bool) -> dict[str, Any]:
    """Returns megatron's description of this rank's shards. Names and offsets in it are global: no layout shows in them."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = {f"model{number}": model_shards(model, metadata) for number, model in enumerate(models)}
    if optimizer is not None:
        sharded["optimizer"] = optimizer_shards(optimizer, sharded, metadata, loading=loading)
    return sharded


def take_snapshot(models: list[torch.nn.Module], optimizer: MegatronOptimizer | None) -> Snapshot:
    """Copy this rank's share to host memory; every rank calls it. Replicas of data parallelism share the work."""
    sharded, common = save_preprocess(sharded_state(models, optimizer, loading=False))
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    FullyParallelSaveStrategyWrapper(_Format(), group).apply_saving_parallelization(sharded)
    weights = {each.key for name, part in sharded.items() if name != "optimizer" for each in nested_values(part)}
    mine, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    for shard in (shard for shards in mine.values() for shard in shards if isinstance(shard, ShardedTensor)):
        shard.data = _host_copy(shard.data)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies are made beside the host's work
    described = mcore_to_pyt_state_dict(mine)  # brings each shard into the shape in which it is stored
    return Snapshot(
        shards=described,
        tensors={(s.key, tuple(s.global_offset)): s.data for s in _all(mine) if isinstance(s, ShardedTensor)},
        objects={(key, None): bytes(each.getbuffer()) for key, each in described.items() if isinstance(each, io.BytesIO)},
        weights=weights,
        common=_saved(common),
        random=None if optimizer is None else _saved(random_state.capture()),
    )


class _Format(SaveShardedStrategy):
    """Stands for the format's name, which megatron's planner of parallel saving asks for."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Any) -> None:
        raise NotImplementedError("shards are written by checkpoint.writer")


def _host_copy(tensor: Tensor) -> Tensor:
    """Returns a copy, also of a CPU tensor: the optimizer goes on changing the original."""
    pinned = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=torch.device("cpu"), pin_memory=pinned)
    return copy.copy_(tensor.detach(), non_blocking=pinned)


def _all(shards: dict[str, list[ShardedBase]]) -> list[ShardedBase]:
    return [shard for same in shards.values() for shard in same]


def _saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()
