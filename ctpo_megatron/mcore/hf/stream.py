"""Megatron's weights as full tensors under their Hugging Face names, each on the rank that sends it (see `models.owners`).

Pieces travel from the ranks that hold them to the tensor's sender, which joins them in one flat buffer per bucket (`gather.py`).
Other ranks, replicas above all, take no part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.mcore.groups import current_coords
from ctpo_megatron.mcore.hf.adapters import Merging
from ctpo_megatron.mcore.hf.buffers import BucketMemory, NamedTensors
from ctpo_megatron.mcore.hf.gather import Gathering
from ctpo_megatron.mcore.hf.load import keyed_tensors, layer_numbers, unwrap
from ctpo_megatron.mcore.hf.shared_memory import domain
from ctpo_megatron.mcore.model.lora import adapter_pairs, adapter_parameters
from ctpo_megatron.models.adapters import adapter_tensors, part_name
from ctpo_megatron.models.owners import Holders, Holding, make_buckets, unit_of
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import hf_tensors
from ctpo_megatron.parallel.plain import all_gather_plain


def find_holders(models: list[nn.Module], shape: ModelShape) -> Holders:
    """Which rank holds what. Every rank calls it."""
    inner = [unwrap(model) for model in models]
    mine = Holding(
        coords=current_coords(),
        layers=tuple(number for model in models for number in layer_numbers(model)),
        first=any(model.pre_process for model in inner),
        last=any(model.post_process for model in inner),
        memory=domain() if next(models[0].parameters()).device.type == "cpu" else "",
    )
    return Holders(all_gather_plain(mine, Holding), shape.num_experts)


def pieces_of(models: list[nn.Module], shape: ModelShape) -> dict[str, Tensor]:
    """What this rank holds of the parameters, by key."""
    coords = current_coords()
    return {key: parameter.detach() for model in models for key, parameter in keyed_tensors(model, shape, coords)}


def sources_of(models: list[nn.Module], shape: ModelShape) -> dict[str, Tensor]:
    """All that this rank's parts of exported tensors are made of: `pieces_of`, and adapters, by `models.adapters.part_name`."""
    parts = {
        part_name(pair.adapted.base.key, tensor.name): parameter.detach()
        for pair in adapter_pairs(models)
        for tensor, parameter in pair.parts()
    }
    return pieces_of(models, shape) | parts


@torch.no_grad()
def export_stream(
    models: list[nn.Module],
    shape: ModelShape,
    bucket_bytes: int,
    *,
    per_stage: bool = False,
    to: int | None = None,
    memory: BucketMemory | None = None,
    only: Collection[str] | None = None,
) -> Iterator[NamedTensors]:
    """Buckets of full tensors, in the model's number format (routers' biases in float32), in a fixed order.

    Adapters are merged into the tensors that have them.

    `per_stage`: who sends, see `models.owners`. `to`: a rank that gets them all, instead of each tensor's sender.
    Every rank has to iterate to the end: a rank that receives
    gets its own buckets, and every rank an empty list for a bucket that only takes pieces away. All ranks get one for the first
    bucket of all, so that they can begin together and go on later. A bucket holds at most `bucket_bytes`, unless a single unit
    is larger; its tensors lie one behind the other in one buffer, so they can be sent as one. They are copies: they do
    not change when the model is trained further. They lie in `memory`, which may be kept for the next stream.
    Layers of multi-token prediction, which are not trained, are left out. `only`: the keys of the parameters that are wanted, the
    same on every rank, None for all; a unit (`models.owners.unit_of`) comes whole.
    """
    parameters = pieces_of(models, shape)
    like = next(unwrap(models[0]).parameters())
    holders, rank = find_holders(models, shape), dist.get_rank()
    gathering = Gathering(holders, parameters, shape, like.dtype, memory or BucketMemory(like.device), Merging(models))
    tensors, first = hf_tensors(shape), True
    if only is not None:
        units = {unit_of(tensor.name) for tensor in tensors if tensor.key in only}
        tensors = [tensor for tensor in tensors if unit_of(tensor.name) in units]
    for sender, share in (holders.shares(tensors, per_stage=per_stage) if to is None else {to: tensors}).items():
        for bucket in make_buckets(share, like.element_size(), bucket_bytes):
            if first or rank == sender or any(rank in holders.of(tensor) for tensor in bucket):
                yield gathering.run(bucket, sender)
            first = False


@torch.no_grad()
def gather_adapters(models: list[nn.Module], shape: ModelShape, adapter: LoraConfig) -> NamedTensors:
    """What is trained of every pair, whole, on rank 0 under the names of `models.adapters`; nothing elsewhere. Collective."""
    parameters = {tensor.key: parameter.detach() for tensor, parameter in adapter_parameters(models)}
    like = next(unwrap(models[0]).parameters())
    memory = BucketMemory(like.device)
    gathering = Gathering(find_holders(models, shape), parameters, shape, like.dtype, memory, Merging([]))
    return gathering.run(adapter_tensors(shape, adapter), 0)
