"""Megatron's weights out in Hugging Face format: as a stream of buckets on rank 0, or as a directory.

Each Hugging Face tensor is sent by the ranks that hold its pieces to rank 0, which joins them. Rank 0 never holds
more than a bucket and its pieces besides its own share of the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from ctpo_megatron.mcore.collective import on_first_rank
from ctpo_megatron.mcore.directories import TEMPORARY_SUFFIX, publish_directory, temporary_directory
from ctpo_megatron.mcore.hf.files import INDEX_FILE
from ctpo_megatron.mcore.hf.load import RankPlace, keyed_parameters, layer_numbers, unwrap
from ctpo_megatron.mcore.hf.names import EMBEDDING_KEY, OUTPUT_KEY, HfTensor, hf_tensors
from ctpo_megatron.mcore.shape import ModelShape

SHARD_BYTES = 2 << 30
COPIED_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")  # tokenizer, templates, generation


@dataclass(frozen=True, slots=True)
class _Holding:
    """What a rank has, as the others need to know it."""

    place: RankPlace
    layers: list[int]
    ends: list[str]  # of the model: the embedding, the output, both or none


@torch.no_grad()
def export_hf(models: list[nn.Module], shape: ModelShape, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Buckets of full tensors under their Hugging Face names, in the model's number format, in a fixed order.

    Every rank has to iterate to the end: rank 0 gets the tensors, all others as many empty lists. A bucket holds at most
    `bucket_bytes`, unless a single tensor is larger.
    """
    place = RankPlace.current()
    parameters = {key: parameter for model in models for key, parameter in keyed_parameters(model, shape, place)}
    first = next(iter(parameters.values()))
    holders = _Holders(models, shape, place)
    for bucket in make_buckets(hf_tensors(shape), first.element_size(), bucket_bytes):
        yield _gather(bucket, holders, parameters, shape, first)


def make_buckets(tensors: list[HfTensor], element_size: int, bucket_bytes: int) -> list[list[HfTensor]]:
    """Cut the list, in order, into runs of at most `bucket_bytes`; a larger tensor gets a bucket of its own."""
    buckets: list[list[HfTensor]] = []
    filled = 0
    for tensor in tensors:
        size = torch.Size(tensor.shape).numel() * element_size
        if not buckets or filled + size > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += size
    return buckets


def save_hf(
    models: list[nn.Module], shape: ModelShape, source_path: str | Path, directory: str | Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a complete model directory: weights, index, and config, tokenizer and generation files copied from `source_path`.

    Every rank calls it; rank 0 writes under a temporary name and renames, so a half-written model never appears.
    Raises CheckpointError, on every rank, when the directory cannot be made or finished.
    """
    target, source = Path(directory), Path(source_path)
    like = next(unwrap(models[0]).parameters())
    count = len(make_buckets(hf_tensors(shape), like.element_size(), shard_bytes))
    on_first_rank(lambda: temporary_directory(target), f"model directory {target} cannot be begun")
    work = target.with_name(target.name + TEMPORARY_SUFFIX)
    weight_map: dict[str, str] = {}
    total = 0
    for number, bucket in enumerate(export_hf(models, shape, shard_bytes), start=1):
        if bucket:  # on rank 0
            name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            save_file({key: tensor.cpu() for key, tensor in bucket}, work / name, metadata={"format": "pt"})
            weight_map |= {key: name for key, _ in bucket}
            total += sum(tensor.nbytes for _, tensor in bucket)

    def finish() -> None:
        _copy_companions(source, work, str(like.dtype).removeprefix("torch."))
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (work / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        publish_directory(work, target)

    on_first_rank(finish, f"model directory {target} cannot be finished")


class _Holders:
    """Which ranks hold the pieces of a tensor; of equal replicas the lowest rank counts. The same on every rank."""

    def __init__(self, models: list[nn.Module], shape: ModelShape, place: RankPlace) -> None:
        self.tp_size, self.experts_per_rank = place.tp_size, max(1, shape.num_experts // place.ep_size)
        mine = _Holding(
            place,
            layers=[number for model in models for number in layer_numbers(model)],
            ends=[EMBEDDING_KEY for model in models if unwrap(model).pre_process]
            + ["output" for model in models if unwrap(model).post_process],
        )
        everyone: list[_Holding] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self.dense: dict[tuple[int | str, int], int] = {}  # (layer or end of the model, tp rank) -> rank
        self.experts: dict[tuple[int | str, int], int] = {}  # (layer, ep rank) -> rank
        for rank, holding in enumerate(everyone):
            for part in (*holding.layers, *holding.ends):
                self.dense.setdefault((part, holding.place.tp_rank), rank)
                self.experts.setdefault((part, holding.place.ep_rank), rank)

    def of(self, tensor: HfTensor) -> list[int]:
        """Ranks in the order in which their pieces are joined."""
        part = tensor.layer if tensor.layer is not None else EMBEDDING_KEY if tensor.key == EMBEDDING_KEY else "output"
        if tensor.expert is not None:
            return [self.experts[part, tensor.expert // self.experts_per_rank]]
        pieces = 1 if tensor.cut.dim is None else self.tp_size
        return [self.dense[part, tp_rank] for tp_rank in range(pieces)]


def _gather(
    bucket: list[HfTensor], holders: _Holders, parameters: dict[str, nn.Parameter], shape: ModelShape, like: Tensor
) -> list[tuple[str, Tensor]]:
    """Rank 0 receives the bucket's pieces and joins them; the others send theirs and get an empty list."""
    rank = dist.get_rank()
    transfers: list[dist.P2POp] = []
    arrived: list[list[Tensor]] = []
    for tensor in bucket:
        pieces = []
        for holder in holders.of(tensor):
            if holder == rank:
                local = parameters[tensor.key]
                piece = tensor.cut.unpack(local.detach(), shape)[tensor.part].to(like.dtype).contiguous()
                if rank != 0:
                    transfers.append(dist.P2POp(dist.isend, piece, 0))
            elif rank == 0:
                piece = torch.empty(_piece_shape(tensor, shape, holders.tp_size), dtype=like.dtype, device=like.device)
                transfers.append(dist.P2POp(dist.irecv, piece, holder))
            else:
                continue
            pieces.append(piece)
        arrived.append(pieces)
    if transfers:
        for transfer in dist.batch_isend_irecv(transfers):
            transfer.wait()
    if rank != 0:
        return []
    return [(tensor.name, _join(tensor, pieces)) for tensor, pieces in zip(bucket, arrived, strict=True)]


def _piece_shape(tensor: HfTensor, shape: ModelShape, tp_size: int) -> list[int]:
    size, dim = list(tensor.shape), tensor.cut.dim
    if dim is not None:
        rows = shape.padded_vocab_size(tp_size) if tensor.key in (EMBEDDING_KEY, OUTPUT_KEY) else size[dim]
        size[dim] = rows // tp_size
    return size


def _join(tensor: HfTensor, pieces: list[Tensor]) -> Tensor:
    """A copy, so the stream does not change when the model is trained further; without the padding of the vocabulary."""
    dim = tensor.cut.dim or 0
    return torch.cat(pieces, dim).narrow(dim, 0, tensor.shape[dim]).contiguous()


def _copy_companions(source: Path, work: Path, dtype: str) -> None:
    """Configuration (with the number format as saved), tokenizer and generation files."""
    for pattern in COPIED_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, work / file.name)
    config = json.loads((work / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # transformers 4's name of the same key
    config["dtype"] = dtype
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
