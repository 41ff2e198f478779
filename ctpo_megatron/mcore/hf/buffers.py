"""Memory that buckets of weights are gathered into, used again and again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class _Room:
    memory: Tensor  # [n] uint8
    tensors: list[weakref.ref[Tensor]] = field(default_factory=list)

    @property
    def free(self) -> bool:
        """Whether nobody holds any of the tensors that lie in it."""
        return all(tensor() is None for tensor in self.tensors)


class BucketMemory:
    """Gives out memory for the tensors of a bucket, and takes it for another one when nobody holds any of them any more.

    On a CPU new memory costs more than all that is done with it, so it is worth keeping from one publication to the next.
    Whoever keeps a view of a tensor has to keep the tensor too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rooms: list[_Room] = []

    @property
    def nbytes(self) -> int:
        """What it holds, in use or not."""
        return sum(room.memory.nbytes for room in self._rooms)

    def allocate(self, layouts: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
        """Tensors of these number formats and shapes, one behind the other in one buffer; what is in them is undefined.

        Each is aligned if the widest formats come first.
        """
        sizes = [torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layouts]
        room = self._room(sum(sizes))
        parts = zip(room.memory[: sum(sizes)].split(sizes), layouts, strict=True)
        tensors = [part.view(dtype).view(shape) for part, (dtype, shape) in parts]
        room.tensors = [weakref.ref(tensor) for tensor in tensors]
        return tensors

    def release(self) -> None:
        """Keep nothing."""
        self._rooms.clear()

    def _room(self, size: int) -> _Room:
        """One that is free and large enough; otherwise a new one, in the place of one that is free."""
        free = [room for room in self._rooms if room.free]
        fitting = [room for room in free if room.memory.nbytes >= size]
        if fitting:
            return min(fitting, key=lambda room: room.memory.nbytes)
        if free:
            self._rooms.remove(free[-1])
            free.clear()  # so that it is given back before the new one is made
        room = _Room(torch.empty(size, dtype=torch.uint8, device=self._device))
        self._rooms.append(room)
        return room
