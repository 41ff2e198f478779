"""What of a model a checkpoint holds: all of it, or its adapters alone, with the words that name the model they belong to.

A and B are stored whole under their keys (`models.adapters`), in which global numbers of layers and experts stand, so any layout
reads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

from ctpo_megatron.checkpoints.hashes import file_hash, text_hash
from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.mcore.groups import current_coords
from ctpo_megatron.mcore.hf.load import unwrap
from ctpo_megatron.mcore.model.lora import adapter_parameters
from ctpo_megatron.models.files import weight_files
from ctpo_megatron.models.tensors import VALUE_HEAD
from ctpo_megatron.parallel.plain import all_gather_plain


def model_shards(model: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns megatron's description of this rank's shards of one chunk; of its adapters only, where it has some."""
    adapters = list(adapter_parameters([model]))
    if not adapters:
        return unwrap(model).sharded_state_dict(metadata=metadata)
    coords, found = current_coords(), {}
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    replica_of_expert = parallel_state.get_expert_data_parallel_rank()
    for tensor, parameter in adapters:
        (rank, size), copy = coords.share(tensor), replica if tensor.expert is None else replica_of_expert
        cut = [] if tensor.cut.dim is None else [(tensor.cut.dim, rank, size)]
        same = (0, 0 if cut else rank, copy)
        found[tensor.key] = ShardedTensor.from_rank_offsets(tensor.key, parameter, *cut, replica_id=same)
    return found


@torch.no_grad()
def take_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Give one chunk what was read for the description of `model_shards`."""
    adapters = list(adapter_parameters([model]))
    if not adapters:
        unwrap(model).load_state_dict(state)
    for tensor, parameter in adapters:
        parameter.copy_(state[tensor.key])


def adapter_words(adapter: LoraConfig, model_path: str) -> dict[str, Any]:
    """Returns what a manifest says of adapters and of the model that they belong to. Collective: the ranks share its files."""
    files = sorted(weight_files(Path(model_path)))
    mine = {file.name: file_hash(file) for file in files[dist.get_rank() :: dist.get_world_size()]}
    shares = all_gather_plain(mine, dict[str, str])
    digest = text_hash(json.dumps(sorted(item for share in shares for item in share.items())))
    words = adapter.model_dump(mode="json", exclude={"path"})
    return {"adapter": words, "base": {"path": str(Path(model_path).resolve()), "digest": digest}}


def check_words(source: Path, manifest: dict[str, Any], words: dict[str, Any] | None) -> None:
    """Raise CheckpointError where a checkpoint is of other adapters than `words`, of another model, or of another kind."""
    stored = manifest.get("adapter")
    if words is None or "adapter" not in words:
        if stored is not None:
            raise CheckpointError(f"{source} holds adapters only ({_said(stored)}), and model.adapter is null; set it to these.")
        return
    if stored is None:
        raise CheckpointError(f"{source} holds all weights and no adapters; set model.adapter to null, or begin a new run.")
    if LoraConfig.model_validate(stored) != LoraConfig.model_validate(words["adapter"]):
        raise CheckpointError(f"{source} holds adapters of {_said(stored)}, and model.adapter is {_said(words['adapter'])}.")
    if manifest["base"]["digest"] != words["base"]["digest"]:
        raise CheckpointError(
            f"{source} holds adapters of the model in {manifest['base']['path']}, and the weights in {words['base']['path']} "
            "are not the same; set model.path to that model."
        )


def check_value_head(source: Path, manifest: dict[str, Any], words: dict[str, Any] | None) -> None:
    """Raise CheckpointError where a checkpoint that a trainer is to go on from has a critic's value head and the trainer none,
    or the other way round."""
    stored, wanted = ((each or {}).get(VALUE_HEAD, False) for each in (manifest, words))
    if stored != wanted:
        having, setting = ("a value head", "gae again") if stored else ("no value head", "what it was")
        raise CheckpointError(f"{source} holds {having}; set algorithm.advantage.type to {setting}, or begin a new run.")


def _said(adapter: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in adapter.items())
