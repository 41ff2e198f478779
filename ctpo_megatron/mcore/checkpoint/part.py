"""One rank's part of the state as plain bytes in a row, to be held by another process, and how it is read back.

    contents   one entry for each shard: name, place in the whole, shape, digest, and where in the row its bytes are
    row        the bytes of all shards, one after another

The shards are those of a checkpoint (`snapshot`): tensors, objects, settings of the optimizer, random states. The hash of the
contents stands for all of it, since the contents hold the digest of every shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from ctpo_megatron.checkpoints.hashes import bytes_hash
from ctpo_megatron.errors import CopyLost
from ctpo_megatron.mcore.checkpoint.snapshot import Place, Snapshot

COMMON: Place = ("common", None)  # settings of the optimizer, of every rank
RANDOM: Place = ("random", None)
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Layout = dict[str, int | bool | None]  # of the ranks together, as the configuration writes it


@dataclass(frozen=True, slots=True)
class Shard:
    """An entry of the contents. An object has neither offset nor shape nor number format."""

    name: str
    offset: tuple[int, ...] | None
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int
    digest: str

    @property
    def place(self) -> Place:
        """Returns where it belongs in the whole."""
        return self.name, self.offset

    def tensor(self, content: Bytes) -> Tensor:
        """Returns the tensor whose bytes are `content`, which it shares."""
        return torch.from_numpy(content).view(getattr(torch, self.dtype)).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a part holds."""

    layout: Layout
    dtype: str  # of the weights
    scheduler_steps: int
    shards: list[Shard]

    def packed(self) -> bytes:
        """Returns it for `parse`."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def parse(cls, packed: bytes, digest: str) -> Contents:
        """Returns what was packed. Raises CopyLost where `packed` has another hash than `digest`."""
        if bytes_hash(packed) != digest:
            raise CopyLost("the contents of a part are not those that the rank handed over")
        return msgspec.msgpack.decode(packed, type=cls)


class Part:
    """What one rank hands over: a snapshot with the `header` of a checkpoint's manifest, at `layout`."""

    def __init__(self, snapshot: Snapshot, header: dict[str, Any], layout: Layout) -> None:
        self._header, self._layout = header, layout
        self._tensors = snapshot.tensors
        self._objects = {**snapshot.objects, COMMON: snapshot.common, RANDOM: snapshot.random or b""}

    @property
    def size(self) -> int:
        """Returns the bytes of the row."""
        return sum(tensor.nbytes for tensor in self._tensors.values()) + sum(map(len, self._objects.values()))

    def contents(self) -> Contents:
        """Returns what is in the row. Hashes all of it, at about 1 GB/s."""
        shards, begin = [], 0
        for (name, offset), content in self._row():
            tensor = self._tensors.get((name, offset))
            shape, dtype = ((), "") if tensor is None else (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            end = begin + len(content)
            shards.append(Shard(name, offset, shape, dtype, begin, end, bytes_hash(content.data)))
            begin = end
        return Contents(self._layout, self._header["dtype"], self._header["scheduler_steps"], shards)

    def pieces(self, most: int) -> Iterator[tuple[int, Bytes]]:
        """Yields the row in pieces of at most `most` bytes, each with where it begins. The next one overwrites the one before."""
        room = np.empty(min(most, self.size), dtype=np.uint8)
        begin = filled = 0
        for _, content in self._row():
            at = 0
            while at < len(content):
                more = min(len(room) - filled, len(content) - at)
                room[filled : filled + more] = content[at : at + more]
                at, filled = at + more, filled + more
                if filled == len(room):
                    yield begin, room
                    begin, filled = begin + filled, 0
        if filled:
            yield begin, room[:filled]

    def _row(self) -> Iterator[tuple[Place, Bytes]]:
        for place, tensor in self._tensors.items():
            yield place, tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        for place, content in self._objects.items():
            yield place, np.frombuffer(content, dtype=np.uint8)
