"""A model's weights between the Hugging Face format and a torch_dist checkpoint: what each rank of a conversion does.

No rank ever holds more than its share and a bucket. Each function runs in a fresh process, on a CPU, and returns how many
tensors, and how many bytes of them, were read back from the output and found equal to what the source holds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.checkpoints.files import MODEL, begin_checkpoint, read_manifest
from ctpo_megatron.checkpoints.hashes import tensor_hash
from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.errors import CheckpointError, ModelError
from ctpo_megatron.mcore.host import megatron_region, prepare_host
from ctpo_megatron.mcore.meeting import TIMEOUT_MINUTES, RankInfo, meet
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.files import read_json
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.parallel.plain import all_gather_plain

if TYPE_CHECKING:  # megatron may be imported only after prepare_host
    from ctpo_megatron.mcore.checkpoint.checkpoint import Trained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class Verified:
    """Counts what was read back and compared."""

    tensors: int
    bytes: int


def checkpoint_shape(checkpoint: Path) -> ModelShape:
    """Returns the model of a checkpoint, from the config.json in it. Raises CheckpointError where there is no checkpoint."""
    read_manifest(checkpoint)
    file = checkpoint / MODEL / "config.json"
    return parse_config(read_json(file), str(file))


def weights_to_megatron(rank: RankInfo, source: str, target: str, parallel: ParallelConfig) -> Verified:
    """Write the weights of the model directory `source` as a checkpoint at `target`; returns what was compared."""
    shape = parse_config(read_json(Path(source) / "config.json"), f"{source}/config.json")
    with _model(rank, shape, parallel, shape.dtype, source) as trained:
        from ctpo_megatron.mcore.checkpoint.background import BackgroundSave
        from ctpo_megatron.mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
        from ctpo_megatron.mcore.collective import on_first_rank
        from ctpo_megatron.mcore.hf.load import load_hf

        load_hf(trained.models, shape, source)
        saver = BackgroundSave(TIMEOUT_MINUTES)
        on_first_rank(lambda: begin_checkpoint(Path(target), {}), f"checkpoint {target} cannot be begun")
        save_checkpoint(target, trained, saver)
        saver.settle()
        _forget(trained.models, shape)  # what is compared has come from the disk
        load_checkpoint(target, trained)
        return _compare(trained.models, shape, Path(source))


def weights_to_hf(rank: RankInfo, source: str, target: str, parallel: ParallelConfig) -> Verified:
    """Write the weights of the checkpoint `source` as a model directory at `target`; returns what was compared.

    Of a checkpoint of adapters these are the weights of the model that it names, with the adapters merged into them.
    """
    shape, manifest = checkpoint_shape(Path(source)), read_manifest(source)
    companions, adapter = str(Path(source) / MODEL), adapter_in(manifest)
    with _model(rank, shape, parallel, manifest["dtype"], companions, adapter) as trained:
        from ctpo_megatron.mcore.checkpoint.checkpoint import load_checkpoint
        from ctpo_megatron.mcore.hf.export import save_hf

        if adapter is not None:
            trained = _with_base(trained, shape, adapter, manifest["base"]["path"])
        load_checkpoint(source, trained)
        save_hf(trained.models, shape, companions, target)
        return _compare(trained.models, shape, Path(target))


def adapters_to_peft(rank: RankInfo, source: str, target: str, parallel: ParallelConfig) -> Verified:
    """Write the adapters in the checkpoint `source` in peft's format at `target`; returns what was compared.

    Raises CheckpointError where it holds none.
    """
    shape, manifest = checkpoint_shape(Path(source)), read_manifest(source)
    adapter = adapter_in(manifest)
    if adapter is None:
        raise CheckpointError(f"{source} holds all weights and no adapters; `ctpo convert to-hf` writes these.")
    with _model(rank, shape, parallel, manifest["dtype"], str(Path(source) / MODEL), adapter) as trained:
        from ctpo_megatron.mcore.checkpoint.checkpoint import load_checkpoint
        from ctpo_megatron.mcore.hf.peft import compare_peft, save_peft

        base = manifest["base"]["path"]
        load_checkpoint(source, _with_base(trained, shape, adapter, base))
        save_peft(trained.models, shape, adapter, base, target)
        return Verified(*compare_peft(trained.models, shape, adapter, target))


def adapter_in(manifest: dict[str, Any]) -> LoraConfig | None:
    """Returns the adapters of a checkpoint; None where it holds all weights."""
    return None if manifest.get("adapter") is None else LoraConfig.model_validate(manifest["adapter"])


def _with_base(trained: Trained, shape: ModelShape, adapter: LoraConfig, base: str) -> Trained:
    """Load the model that adapters belong to. Raises ModelError where it is not where it was."""
    from ctpo_megatron.mcore.checkpoint.trainables import adapter_words
    from ctpo_megatron.mcore.hf.load import load_hf

    load_hf(trained.models, shape, base)
    return replace(trained, words=adapter_words(adapter, base))


@contextlib.contextmanager
def _model(
    rank: RankInfo, shape: ModelShape, parallel: ParallelConfig, dtype: str, path: str, adapter: LoraConfig | None = None
) -> Iterator[Trained]:
    """Yields this rank's part of the model, with weights not yet loaded."""
    if dtype not in DTYPES:
        raise ModelError(f"{path}: its weights are {dtype}; what can be converted is {' or '.join(DTYPES)}.")
    device = prepare_host("cpu")
    meet(rank, device)
    try:
        with megatron_region(device):
            from ctpo_megatron.mcore import groups
            from ctpo_megatron.mcore.checkpoint.checkpoint import Trained
            from ctpo_megatron.mcore.model.build import build_model

            groups.init_parallel_groups(parallel, seed=0, timeout_minutes=TIMEOUT_MINUTES)
            try:
                models = build_model(shape, parallel, DTYPES[dtype], device, trainable=False, adapter=adapter)
                yield Trained(models, None, None, path)
            finally:
                groups.destroy_parallel_groups()
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def _forget(models: list[torch.nn.Module], shape: ModelShape) -> None:
    from ctpo_megatron.mcore.groups import current_coords
    from ctpo_megatron.mcore.hf.load import keyed_tensors

    for model in models:
        for _, tensor in keyed_tensors(model, shape, current_coords()):
            tensor.fill_(math.nan)


def _compare(models: list[torch.nn.Module], shape: ModelShape, directory: Path) -> Verified:
    """Compare the hash of each of the ranks' tensors with that of the file's tensor of its name; the ranks share the work."""
    from ctpo_megatron.mcore.collective import first_complaint
    from ctpo_megatron.mcore.hf.load import HfReader
    from ctpo_megatron.mcore.hf.stream import export_stream

    tensors, size, complaint = 0, 0, None
    with HfReader(directory) as reader:
        for bucket in export_stream(models, shape, BUCKET_BYTES):
            for name, tensor in bucket:
                found = reader.handles[name].get_tensor(name) if name in reader.handles else None
                if not _equal(found, tensor):
                    complaint = complaint or f"{directory}: {name} is not what the other side holds"
                tensors, size = tensors + 1, size + tensor.nbytes
    if complaint := first_complaint(complaint):
        raise CheckpointError(complaint)
    shares = all_gather_plain((tensors, size), tuple[int, int])
    return Verified(*(sum(column) for column in zip(*shares, strict=True)))


def _equal(stored: Tensor | None, tensor: Tensor) -> bool:
    """Returns whether the bytes are equal; a router's bias that is stored narrower than the model keeps it is widened first."""
    if stored is None or stored.shape != tensor.shape or stored.dtype.itemsize > tensor.dtype.itemsize:
        return False
    return tensor_hash(stored.to(tensor.dtype)) == tensor_hash(tensor)
