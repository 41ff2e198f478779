"""Megatron's weights as a Hugging Face model directory, written by all senders together (see `models.owners`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ctpo_megatron.checkpoints.directories import TEMPORARY_SUFFIX, complete_directory, temporary_directory
from ctpo_megatron.errors import CheckpointError, CheckpointUnwritten, mendable, reason
from ctpo_megatron.mcore.collective import first_complaint, on_first_rank
from ctpo_megatron.mcore.hf.load import unwrap
from ctpo_megatron.mcore.hf.stream import export_stream, find_holders
from ctpo_megatron.models.files import INDEX_FILE
from ctpo_megatron.models.owners import Holders, make_buckets, nbytes
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import hf_tensors

SHARD_BYTES = 2 << 30
COPIED_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")  # tokenizer, templates, generation


def save_hf(
    models: list[nn.Module], shape: ModelShape, source_path: str | Path, directory: str | Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a complete model directory: weights, index, and config, tokenizer and generation files copied from `source_path`.

    Layers of multi-token prediction are left out, and its config.json says that there are none.
    Every rank calls it. Each sender writes the files of its own tensors, so the directory has to be on a file system that all
    nodes share; it is written under a temporary name and renamed, so a half-written model never appears.
    Raises CheckpointError, on every rank, when the directory cannot be made, written or finished.
    """
    target, source = Path(directory), Path(source_path)
    like = next(unwrap(models[0]).parameters())
    on_first_rank(lambda: temporary_directory(target), f"model directory {target} cannot be begun")
    work = target.with_name(target.name + TEMPORARY_SUFFIX)
    files = _shards(find_holders(models, shape), shape, like.element_size(), shard_bytes)
    problem: str | None = None
    may_pass = False
    for bucket in export_stream(models, shape, shard_bytes):
        if bucket and problem is None:  # a sender that cannot write goes on gathering: the others wait for it
            tensors = {name: tensor.cpu() for name, tensor in bucket}
            try:
                save_file(tensors, work / files[bucket[0][0]], metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                problem, may_pass = f"model directory {target} cannot be written: {reason(error, work)}", mendable(error, work)
    if (complaint := first_complaint(problem if may_pass else None)) is not None:
        raise CheckpointUnwritten(complaint)
    if (complaint := first_complaint(problem)) is not None:
        raise CheckpointError(complaint)

    def finish() -> None:
        copy_companions(source, work, str(like.dtype).removeprefix("torch."))
        if len(set(files.values())) > 1:
            total = sum(nbytes(tensor, like.element_size()) for tensor in hf_tensors(shape))
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (work / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        complete_directory(work, target)

    on_first_rank(finish, f"model directory {target} cannot be finished")


def _shards(holders: Holders, shape: ModelShape, element_size: int, shard_bytes: int) -> dict[str, str]:
    """The file of every tensor, the same on every rank."""
    shares = holders.shares(hf_tensors(shape)).values()
    shards = [shard for share in shares for shard in make_buckets(share, element_size, shard_bytes)]
    if len(shards) == 1:
        return {tensor.name: "model.safetensors" for tensor in shards[0]}
    return {
        tensor.name: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number, shard in enumerate(shards, start=1)
        for tensor in shard
    }


def copy_companions(source: Path, work: Path, dtype: str) -> None:
    """Configuration (number format as saved, no layers of multi-token prediction), tokenizer and generation files."""
    for pattern in COPIED_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, work / file.name)
    config = json.loads((work / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # transformers 4's name of the same key
    config["dtype"] = dtype
    config |= {key: 0 for key in ("num_nextn_predict_layers", "num_mtp_layers") if key in config}
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
