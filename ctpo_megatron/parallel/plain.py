"""Collectives of plain data: numbers, texts, lists and dataclasses, sent as MessagePack and read back as the expected type.

torch's own collectives of objects (`all_gather_object` and its like) unpickle what other ranks send, and unpickling runs what it
is told. Ranks meet at stores and sockets that ask nobody who he is, so what comes from there is parsed, never executed. Types are
those of msgspec; a value of another type than expected is an error that says where.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def all_gather_plain(mine: T, kind: Any, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank of `group` brought, in rank order. `kind`: the type of each, see msgspec.

    None stands for the default group. Every rank calls it. Raises ValueError for what is not of that type.
    """
    content = _packed(mine, group)
    sizes = _sizes(content, group)
    gathered = [content.new_empty(max(sizes)) for _ in sizes]
    dist.all_gather(gathered, _padded(content, max(sizes)), group=group)
    return [_read(each[:size], kind, rank) for rank, (each, size) in enumerate(zip(gathered, sizes, strict=True))]


def gather_plain(mine: T, kind: Any, group: dist.ProcessGroup | None = None) -> list[T]:
    """As `all_gather_plain`, on rank 0 of `group`; an empty list on the others."""
    content = _packed(mine, group)
    sizes = _sizes(content, group)
    first = dist.get_rank(group) == 0
    gathered = [content.new_empty(max(sizes)) for _ in sizes] if first else None
    dist.gather(_padded(content, max(sizes)), gathered, group=group, group_dst=0)
    if gathered is None:
        return []
    return [_read(each[:size], kind, rank) for rank, (each, size) in enumerate(zip(gathered, sizes, strict=True))]


def broadcast_plain(mine: T | None, kind: Any, group: dist.ProcessGroup | None = None, *, source: int = 0) -> T:
    """What rank `source` of `group` brought; what the others bring does not count, and may be None.

    Every rank calls it. Raises ValueError for what is not of that type.
    """
    sends = dist.get_rank(group) == source
    content = _packed(mine if sends else None, group)
    size = content.new_full((1,), content.numel(), dtype=torch.int64)
    dist.broadcast(size, group=group, group_src=source)
    received = content if sends else content.new_empty(int(size))
    dist.broadcast(received, group=group, group_src=source)
    found: T = _read(received, kind, source)
    return found


def _packed(value: object, group: dist.ProcessGroup | None) -> Tensor:
    """The bytes of a value, uint8 [size], on the device that the group's collectives work on."""
    content = bytearray(msgspec.msgpack.encode(value))  # at least one byte; a bytearray, for a tensor wants to be writable
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    return torch.frombuffer(content, dtype=torch.uint8).to(device)


def _sizes(content: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """How many bytes each rank brings."""
    mine = content.new_full((1,), content.numel(), dtype=torch.int64)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return torch.cat(sizes).tolist()


def _padded(content: Tensor, size: int) -> Tensor:
    """`content` at the length that all ranks send."""
    return torch.nn.functional.pad(content, (0, size - content.numel()))


def _read(content: Tensor, kind: Any, rank: int) -> Any:
    try:
        return msgspec.msgpack.decode(content.cpu().numpy().tobytes(), type=kind)
    except msgspec.DecodeError as error:  # of which ValidationError is one
        raise ValueError(f"rank {rank} sent what cannot be read: {error}") from error
