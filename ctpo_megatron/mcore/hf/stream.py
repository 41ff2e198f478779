"""Megatron's weights as full tensors under their Hugging Face names, each on the rank that sends it (see `models.owners`).

Pieces travel from the ranks that hold them to the tensor's sender, which joins them in one flat buffer per bucket. Other ranks,
replicas above all, take no part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.mcore.groups import current_coords
from ctpo_megatron.mcore.hf.adapters import Merging
from ctpo_megatron.mcore.hf.buffers import BucketMemory, NamedTensors
from ctpo_megatron.mcore.hf.cuts import unpack
from ctpo_megatron.mcore.hf.load import keyed_tensors, layer_numbers, unwrap
from ctpo_megatron.mcore.model.lora import adapter_pairs, adapter_parameters
from ctpo_megatron.models.adapters import adapter_tensors, part_name
from ctpo_megatron.models.owners import Holders, Holding, make_buckets, unit_of
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import EMBEDDING_KEY, OUTPUT_KEY, HfTensor, hf_tensors
from ctpo_megatron.parallel.plain import all_gather_plain

_PADDED = (EMBEDDING_KEY, OUTPUT_KEY)  # with rows for tokens that do not exist


def find_holders(models: list[nn.Module], shape: ModelShape) -> Holders:
    """Which rank holds what. Every rank calls it."""
    inner = [unwrap(model) for model in models]
    mine = Holding(
        coords=current_coords(),
        layers=tuple(number for model in models for number in layer_numbers(model)),
        first=any(model.pre_process for model in inner),
        last=any(model.post_process for model in inner),
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
    gathering = _Gathering(holders, parameters, shape, like.dtype, memory or BucketMemory(like.device), Merging(models))
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
    gathering = _Gathering(find_holders(models, shape), parameters, shape, like.dtype, memory, Merging([]))
    return gathering.run(adapter_tensors(shape, adapter), 0)


@dataclass(frozen=True, slots=True)
class _Gathering:
    """Joins the pieces of tensors at their senders. `parameters`: this rank's, by key."""

    holders: Holders
    parameters: Mapping[str, Tensor]
    shape: ModelShape
    dtype: torch.dtype
    memory: BucketMemory
    merging: Merging

    def run(self, bucket: list[HfTensor], sender: int) -> NamedTensors:
        """`sender` receives the pieces in their places, and copies its own meanwhile; the others get an empty list."""
        rank = dist.get_rank()
        full = self._allocate(bucket) if rank == sender else {}
        transfers: list[dist.P2POp] = []
        own: list[tuple[Tensor, Tensor]] = []  # places in the bucket, and the pieces that belong there
        strided: list[tuple[Tensor, Tensor]] = []  # places that are not contiguous, and where their pieces arrive
        for tensor in bucket:
            ranks = self.holders.of(tensor)
            for number, holder in enumerate(ranks):
                start, length = _extent(tensor, number, len(ranks), self.shape)
                if length == 0 or rank not in (holder, sender):  # a piece of nothing but the vocabulary's padding
                    continue
                slot = full[tensor.name].narrow(tensor.cut.dim or 0, start, length) if rank == sender else None
                if slot is None:  # this rank holds the piece, and another one sends the whole
                    piece = self._piece(tensor, length).to(self._dtype_of(tensor)).contiguous()
                    transfers.append(dist.P2POp(dist.isend, piece, sender))
                elif holder == rank:
                    own.append((slot, self._piece(tensor, length)))
                else:
                    arriving = slot if slot.is_contiguous() else torch.empty_like(slot, memory_format=torch.contiguous_format)
                    if arriving is not slot:
                        strided.append((slot, arriving))
                    transfers.append(dist.P2POp(dist.irecv, arriving, holder))
        under_way = dist.batch_isend_irecv(transfers) if transfers else []
        for slot, piece in own:
            (slot if slot.shape == piece.shape else slot.view(piece.shape)).copy_(piece)
        for work in under_way:
            work.wait()
        for slot, arrived in strided:
            slot.copy_(arrived)
        return list(full.items())

    def _piece(self, tensor: HfTensor, length: int) -> Tensor:
        """A view of what this rank holds of it, `length` rows or columns without the vocabulary's padding."""
        piece = self.merging.merged(tensor, unpack(tensor.cut, self.parameters[tensor.key], self.shape)[tensor.part])
        return piece[:length] if tensor.key in _PADDED else piece

    def _allocate(self, bucket: list[HfTensor]) -> dict[str, Tensor]:
        """Tensors for the bucket in one buffer; the widest number format first, so that all are aligned."""
        ordered = sorted(bucket, key=lambda tensor: -self._dtype_of(tensor).itemsize)
        tensors = self.memory.allocate([(self._dtype_of(tensor), tensor.shape) for tensor in ordered])
        return {tensor.name: memory for tensor, memory in zip(ordered, tensors, strict=True)}

    def _dtype_of(self, tensor: HfTensor) -> torch.dtype:
        return torch.float32 if tensor.precise else self.dtype


def _extent(tensor: HfTensor, number: int, pieces: int, shape: ModelShape) -> tuple[int, int]:
    """Where piece `number` of the tensor begins along its cut, and how long it is without the vocabulary's padding."""
    whole = tensor.shape[tensor.cut.dim or 0]
    rows = shape.padded_vocab_size(pieces) if tensor.key in _PADDED else whole
    start = number * (rows // pieces)
    return min(start, whole), max(0, min(rows // pieces, whole - start))
