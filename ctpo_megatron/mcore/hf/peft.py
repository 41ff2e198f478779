"""Adapters in peft's format: each rank reads the pieces that it keeps; rank 0 writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ctpo_megatron.checkpoints.directories import TEMPORARY_SUFFIX, complete_directory, temporary_directory
from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.errors import CheckpointError, ModelError
from ctpo_megatron.mcore.collective import first_complaint, on_first_rank
from ctpo_megatron.mcore.hf.adapters import own_piece
from ctpo_megatron.mcore.hf.stream import gather_adapters
from ctpo_megatron.mcore.model.lora import adapter_parameters
from ctpo_megatron.models.peft import CONFIG_FILE, PREFIX, WEIGHTS_FILE, check_peft_config, check_peft_names, peft_config
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.parallel.plain import all_gather_plain


@torch.no_grad()
def load_peft(models: list[nn.Module], shape: ModelShape, adapter: LoraConfig, directory: str | Path) -> None:
    """Take the values of A and B from a directory of peft's. Raises ModelError where it describes or holds others."""
    path = Path(directory)
    check_peft_config(path, shape, adapter)
    file = path / WEIGHTS_FILE
    if not file.is_file():
        raise ModelError(f"{file} is not there; adapters are read from safetensors only.")
    try:
        with safe_open(file, framework="pt") as stored:
            check_peft_names(path, set(stored.keys()), shape, adapter)
            for tensor, parameter in adapter_parameters(models):
                whole = stored.get_tensor(PREFIX + tensor.name)
                if tuple(whole.shape) != tensor.shape:
                    raise ModelError(f"{file}: {tensor.name} is {list(whole.shape)}; the model asks for {list(tensor.shape)}.")
                parameter.copy_(own_piece(whole, tensor))
    except SafetensorError as error:
        raise ModelError(f"{file}: not a readable safetensors file: {error}.") from error


def compare_peft(models: list[nn.Module], shape: ModelShape, adapter: LoraConfig, directory: str | Path) -> tuple[int, int]:
    """Returns tensors and bytes in a directory of peft's, equal to A and B here; the same on every rank. Collective.

    Raises CheckpointError, on every rank, where one differs.
    """
    found = gather_adapters(models, shape, adapter)
    file, complaint = Path(directory) / WEIGHTS_FILE, None
    if found:
        with safe_open(file, framework="pt") as stored:
            for name, tensor in found:
                if not torch.equal(stored.get_tensor(PREFIX + name), tensor.cpu()):
                    complaint = complaint or f"{file}: {name} is not what the checkpoint holds"
    if complaint := first_complaint(complaint):
        raise CheckpointError(complaint)
    mine = (len(found), sum(tensor.nbytes for _, tensor in found))
    return max(all_gather_plain(mine, tuple[int, int]))


def save_peft(models: list[nn.Module], shape: ModelShape, adapter: LoraConfig, base: str, directory: str | Path) -> None:
    """Write A and B as peft does, for the model at `base`. Collective.

    Raises CheckpointError, on every rank, where rank 0 cannot.

    It is written under a temporary name and renamed, so half of an adapter never appears.
    """
    target = Path(directory)
    work = target.with_name(target.name + TEMPORARY_SUFFIX)
    tensors = {PREFIX + name: tensor.cpu() for name, tensor in gather_adapters(models, shape, adapter)}

    def write() -> None:
        temporary_directory(target)
        save_file(tensors, work / WEIGHTS_FILE, metadata={"format": "pt"})
        (work / CONFIG_FILE).write_text(json.dumps(peft_config(shape, adapter, base), indent=2) + "\n", encoding="utf-8")
        complete_directory(work, target)

    on_first_rank(write, f"adapter directory {target} cannot be written")
