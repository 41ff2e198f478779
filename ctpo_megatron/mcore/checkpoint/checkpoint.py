"""Checkpoints: weights, optimizer, schedule and random states, in Megatron's distributed format, complete or not at all.

Every rank writes and reads its part. The format describes whole tensors, so a run may go on with other tp, pp, ep and dp. A
checkpoint's files are described in `files`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.mcore.checkpoint.files import VERSION, publish_checkpoint, read_manifest
from ctpo_megatron.mcore.checkpoint.optimizer_state import load_optimizer, optimizer_shards
from ctpo_megatron.mcore.checkpoint.writer import save_strategy
from ctpo_megatron.mcore.collective import on_first_rank
from ctpo_megatron.mcore.directories import TEMPORARY_SUFFIX, temporary_directory
from ctpo_megatron.mcore.hf.load import unwrap


def save_checkpoint(
    directory: str | Path,
    models: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    state: dict[str, Any],
) -> None:
    """Write a checkpoint; every rank calls it. `state` has to be what JSON knows; rank 0's is kept.

    Raises CheckpointError on every rank when it cannot be written; what stood at `directory` before then still stands.
    """
    target = Path(directory)
    header = {"version": VERSION, "world_size": dist.get_world_size(), "scheduler_steps": scheduler.num_steps, "state": state}

    def begin() -> None:
        json.dumps(header)  # refuses what JSON does not know before anything is written
        temporary_directory(target)

    on_first_rank(begin, f"checkpoint {target} cannot be begun")
    work = target.with_name(target.name + TEMPORARY_SUFFIX)
    sharded = _sharded_state(models, optimizer, loading=False)

    def write() -> None:
        dist_checkpointing.save(sharded, str(work), save_strategy())
        _save_random_state(work)

    _together(write, f"checkpoint {target} cannot be written")
    on_first_rank(lambda: publish_checkpoint(work, target, header), f"checkpoint {target} cannot be finished")


def load_checkpoint(
    directory: str | Path, models: list[torch.nn.Module], optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> dict[str, Any]:
    """Take weights, optimizer, schedule and random states from a checkpoint; returns the `state` it was saved with.

    Every rank calls it. The schedule's place is restored, its settings are the present ones. Random states are restored where
    the number of ranks is the same. Raises CheckpointError for a checkpoint that is missing, incomplete, or of another model.
    """
    source = Path(directory)
    header = read_manifest(source)
    sharded = _sharded_state(models, optimizer, loading=True)

    def read() -> None:
        loaded = dist_checkpointing.load(sharded, str(source), strict="raise_all")
        for number, model in enumerate(models):
            unwrap(model).load_state_dict(loaded[f"model{number}"])
        load_optimizer(optimizer, loaded["optimizer"])

    _together(read, f"checkpoint {source} cannot be read into this model")
    scheduler.num_steps = 0
    scheduler.step(header["scheduler_steps"])
    if header["world_size"] == dist.get_world_size():
        _load_random_state(source)
    return header["state"]


def _sharded_state(models: list[torch.nn.Module], optimizer: MegatronOptimizer, loading: bool) -> dict[str, Any]:
    """megatron's description of this rank's shards."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = {f"model{number}": unwrap(model).sharded_state_dict(metadata=metadata) for number, model in enumerate(models)}
    sharded["optimizer"] = optimizer_shards(optimizer, sharded, metadata, loading=loading)
    return sharded


def _together(action: Callable[[], None], failure: str) -> None:
    """Run `action` on all ranks; what goes wrong becomes a CheckpointError."""
    try:
        action()
    except CheckpointException as error:  # torch's, which tells every rank about all of them
        reasons = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items()))
        raise CheckpointError(f"{failure}: {reasons}") from error
    except (CheckpointingException, OSError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{failure}: {error}") from error
    dist.barrier()


def _save_random_state(checkpoint: Path) -> None:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    file = _random_file(checkpoint)
    file.parent.mkdir(exist_ok=True)
    torch.save(states, file)


def _load_random_state(checkpoint: Path) -> None:
    states = torch.load(_random_file(checkpoint), weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])


def _random_file(checkpoint: Path) -> Path:
    return checkpoint / "random" / f"rank_{dist.get_rank():05d}.pt"
