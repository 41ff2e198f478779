"""Memory that buckets of weights are gathered into, used again and again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

NamedTensors: TypeAlias = list[tuple[str, Tensor]]
"""Full tensors under their Hugging Face names: a bucket of weights."""


@dataclass(slots=True, eq=False)
class _Buffer:
    memory: Tensor  # [n] uint8
    tensors: list[weakref.ref[Tensor]] = field(default_factory=list)

    @property
    def free(self) -> bool:
        """Whether none of the tensors that lie in it is held any more."""
        return all(tensor() is None for tensor in self.tensors)


class BucketMemory:
    """Gives out memory for the tensors of a bucket, and takes it for another one when none of them is held any more.

    On a CPU new memory costs more than all that is done with it, so it is worth keeping from one publication to the next.
    A caller that keeps a view of a tensor has to keep the tensor too.

    On a GPU nothing is kept, since torch's allocator does that better. A server that has mapped a bucket answers when its
    copies are queued, not when they are done: memory that is freed waits for them (CUDA IPC counts its readers), memory that is
    written again does not. All pieces are as large as the largest so far, so that torch can give out the same ones again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[_Buffer] = []
        self._largest = 0  # bytes of a buffer on a GPU

    @property
    def nbytes(self) -> int:
        """What it holds, in use or not."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def allocate(self, layouts: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
        """Tensors of these number formats and shapes, one behind the other in one buffer; what is in them is undefined.

        Each is aligned if the widest formats come first.
        """
        sizes = [torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layouts]
        buffer = self._buffer(sum(sizes))
        parts = zip(buffer.memory[: sum(sizes)].split(sizes), layouts, strict=True)
        tensors = [part.view(dtype).view(shape) for part, (dtype, shape) in parts]
        buffer.tensors = [weakref.ref(tensor) for tensor in tensors]
        return tensors

    def _buffer(self, size: int) -> _Buffer:
        """One that is free and large enough; otherwise a new one, in the place of one that is free."""
        if self._device.type != "cpu":
            self._largest = max(self._largest, size)
            return _Buffer(torch.empty(self._largest, dtype=torch.uint8, device=self._device))
        free = [buffer for buffer in self._buffers if buffer.free]
        fitting = [buffer for buffer in free if buffer.memory.nbytes >= size]
        if fitting:
            return min(fitting, key=lambda buffer: buffer.memory.nbytes)
        if free:
            self._buffers.remove(free[-1])
            free.clear()  # so that it is given back before the new one is made
        buffer = _Buffer(torch.empty(size, dtype=torch.uint8, device=self._device))
        self._buffers.append(buffer)
        return buffer
