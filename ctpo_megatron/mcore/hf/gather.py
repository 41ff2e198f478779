"""Joins the pieces of a bucket's tensors at the rank that sends them.

A holder on the sender's host writes its pieces into the bucket itself, where that lies in memory that it can map:

    sender                               near holder                          far holder
    offer the memory's handle ------->   map it
                          <-----------   a byte: 1, it can; or 0, and it does as a far one
    copy its own pieces                  copy its pieces
    receive those of others   <-------------------------------------------    send its pieces
                          <-----------   a byte: they are there
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.mcore.hf.adapters import Merging
from ctpo_megatron.mcore.hf.buffers import BucketMemory, Layout, NamedTensors
from ctpo_megatron.mcore.hf.cuts import unpack
from ctpo_megatron.mcore.hf.shared_memory import Handle, handle_of
from ctpo_megatron.models.owners import Holders
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import EMBEDDING_KEY, OUTPUT_KEY, HfTensor

PADDED = (EMBEDDING_KEY, OUTPUT_KEY)  # with rows for tokens that do not exist
OFFER_BYTES = 1024  # of the message with a handle: two paths and a number


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one rank holds of a tensor: `length` rows or columns from `start` on, without the vocabulary's padding."""

    tensor: HfTensor
    holder: int
    start: int
    length: int

    def place(self, full: Mapping[str, Tensor]) -> Tensor:
        """Where it belongs in the whole tensor."""
        return full[self.tensor.name].narrow(self.tensor.cut.dim or 0, self.start, self.length)


@dataclass(frozen=True, slots=True)
class Gathering:
    """Gathers buckets, one after the other. `parameters`: this rank's, by key. `memory`: where buckets lie at their senders."""

    holders: Holders
    parameters: Mapping[str, Tensor]
    shape: ModelShape
    dtype: torch.dtype
    memory: BucketMemory
    merging: Merging

    def run(self, bucket: list[HfTensor], sender: int) -> NamedTensors:
        """The whole tensors at `sender`; an empty list elsewhere. The sender and the ranks that hold pieces call it.

        The widest number format comes first, so that all tensors are aligned.
        """
        ordered = sorted(bucket, key=lambda tensor: -self._dtype_of(tensor).itemsize)
        pieces = [piece for tensor in bucket for piece in self._pieces(tensor) if piece.length]
        rank = dist.get_rank()
        if rank == sender:
            return list(self._join(ordered, pieces).items())
        if mine := [piece for piece in pieces if piece.holder == rank]:
            self._give(ordered, mine, sender)
        return []

    def _join(self, bucket: list[HfTensor], pieces: list[_Piece]) -> dict[str, Tensor]:
        """The whole tensors: this rank's own pieces are copied while those of others come."""
        rank = dist.get_rank()
        full = _named(bucket, self.memory.allocate(self._layout(bucket)))
        writers = self._offer(full, sorted({piece.holder for piece in pieces if self._near(piece.holder, rank)} - {rank}))
        written = [dist.P2POp(dist.irecv, torch.zeros(1, dtype=torch.uint8), holder) for holder in writers]
        sent, strided = [], []  # what comes through sockets; places that are not contiguous, and where their pieces arrive
        for piece in pieces:
            if piece.holder in writers or piece.holder == rank:
                continue
            place = piece.place(full)
            arriving = place if place.is_contiguous() else torch.empty_like(place, memory_format=torch.contiguous_format)
            if arriving is not place:
                strided.append((place, arriving))
            sent.append(dist.P2POp(dist.irecv, arriving, piece.holder))
        under_way = dist.batch_isend_irecv(transfers) if (transfers := written + sent) else []
        self._write([piece for piece in pieces if piece.holder == rank], full)
        for work in under_way:
            work.wait()
        for place, arrived in strided:
            place.copy_(arrived)
        return full

    def _near(self, holder: int, sender: int) -> bool:
        """Whether a holder is offered the sender's memory. All ranks find the same."""
        return self.memory.shared and self.holders.share_memory(holder, sender)

    def _offer(self, full: Mapping[str, Tensor], near: list[int]) -> list[int]:
        """Those of `near` who write into the bucket themselves."""
        handle = handle_of(next(iter(full.values()))) if near else None
        answers = [torch.zeros(1, dtype=torch.uint8) for _ in near]
        offers = [dist.P2POp(dist.isend, _message(handle), holder) for holder in near]
        asked = [dist.P2POp(dist.irecv, answer, holder) for answer, holder in zip(answers, near, strict=True)]
        for work in dist.batch_isend_irecv(offers + asked) if near else []:
            work.wait()
        return [holder for answer, holder in zip(answers, near, strict=True) if answer.item()]

    def _give(self, bucket: list[HfTensor], mine: list[_Piece], sender: int) -> None:
        """Write this rank's pieces into the sender's bucket, or send them."""
        if self._near(dist.get_rank(), sender) and (full := self._taken_up(bucket, sender)) is not None:
            self._write(mine, full)
            dist.send(torch.ones(1, dtype=torch.uint8), sender)
            return
        pieces = [self._held(piece).to(self._dtype_of(piece.tensor)).contiguous() for piece in mine]
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, piece, sender) for piece in pieces]):
            work.wait()

    def _taken_up(self, bucket: list[HfTensor], sender: int) -> dict[str, Tensor] | None:
        """The sender's bucket, mapped here; None where it is not offered or cannot be mapped. The sender hears which."""
        message, full = torch.zeros(OFFER_BYTES, dtype=torch.uint8), None
        dist.recv(message, sender)
        handle = msgspec.json.decode(bytes(message.numpy()), type=Handle | None)
        if handle is not None:
            with contextlib.suppress(WeightSyncError):
                full = _named(bucket, self.memory.of_another(handle, self._layout(bucket)))
        dist.send(torch.tensor([full is not None], dtype=torch.uint8), sender)
        return full

    def _write(self, mine: list[_Piece], full: Mapping[str, Tensor]) -> None:
        """Copy this rank's pieces into their places."""
        for each in mine:
            place, piece = each.place(full), self._held(each)
            (place if place.shape == piece.shape else place.view(piece.shape)).copy_(piece)

    def _pieces(self, tensor: HfTensor) -> Iterator[_Piece]:
        ranks = self.holders.of(tensor)
        whole = tensor.shape[tensor.cut.dim or 0]
        rows = self.shape.padded_vocab_size(len(ranks)) if tensor.key in PADDED else whole
        each = rows // len(ranks)
        for number, holder in enumerate(ranks):
            start = number * each
            yield _Piece(tensor, holder, min(start, whole), max(0, min(each, whole - start)))

    def _held(self, piece: _Piece) -> Tensor:
        """This rank's piece as it holds it, with what an adapter adds."""
        tensor = piece.tensor
        held = self.merging.merged(tensor, unpack(tensor.cut, self.parameters[tensor.key], self.shape)[tensor.part])
        return held[: piece.length] if tensor.key in PADDED else held

    def _layout(self, bucket: list[HfTensor]) -> Layout:
        return [(self._dtype_of(tensor), tensor.shape) for tensor in bucket]

    def _dtype_of(self, tensor: HfTensor) -> torch.dtype:
        return torch.float32 if tensor.precise else self.dtype


def _named(bucket: list[HfTensor], tensors: list[Tensor]) -> dict[str, Tensor]:
    return {tensor.name: memory for tensor, memory in zip(bucket, tensors, strict=True)}


def _message(handle: Handle | None) -> Tensor:
    """A handle, or that there is none, as [OFFER_BYTES] uint8."""
    text = msgspec.json.encode(handle).ljust(OFFER_BYTES)
    if len(text) > OFFER_BYTES:
        raise ValueError(f"the handle of shared memory has {len(text)} bytes, allowed are {OFFER_BYTES}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
