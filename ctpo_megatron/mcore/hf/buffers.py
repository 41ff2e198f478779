"""Memory that buckets of weights are gathered into, used again and again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ctpo_megatron.mcore.hf.shared_memory import Handle, Mapped, new_shared

NamedTensors: TypeAlias = list[tuple[str, Tensor]]
"""Full tensors under their Hugging Face names: a bucket of weights."""

Layout: TypeAlias = Sequence[tuple[torch.dtype, tuple[int, ...]]]
"""Number formats and shapes of a bucket's tensors. Each is aligned if the widest formats come first."""


def laid_out(memory: Tensor, layout: Layout) -> list[Tensor]:
    """The tensors of `layout`, one behind the other in `memory` [n] uint8."""
    sizes = [nbytes(dtype, shape) for dtype, shape in layout]
    parts = zip(memory[: sum(sizes)].split(sizes), layout, strict=True)
    return [part.view(dtype).view(shape) for part, (dtype, shape) in parts]


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


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
    A caller that keeps a view of a tensor has to keep the tensor too. `shared`: other processes of the host can map it
    (`shared_memory.handle_of`), where there is room for that.

    On a GPU nothing is kept, since torch's allocator does that better. A server that has mapped a bucket answers when its
    copies are queued, not when they are done: memory that is freed waits for them (CUDA IPC counts its readers), memory that is
    written again does not. All pieces are as large as the largest so far, so that torch can give out the same ones again. So are
    shared ones, since others have them mapped.
    """

    def __init__(self, device: torch.device, *, shared: bool = False) -> None:
        self._device = device
        self.shared = shared and device.type == "cpu"
        self._buffers: list[_Buffer] = []
        self._largest = 0  # bytes asked for so far
        self._others = Mapped()

    @property
    def nbytes(self) -> int:
        """What it holds, in use or not."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def allocate(self, layout: Layout) -> list[Tensor]:
        """The tensors of `layout`, one behind the other in one buffer; what is in them is undefined."""
        buffer = self._buffer(sum(nbytes(dtype, shape) for dtype, shape in layout))
        tensors = laid_out(buffer.memory, layout)
        buffer.tensors = [weakref.ref(tensor) for tensor in tensors]
        return tensors

    def of_another(self, handle: Handle, layout: Layout) -> list[Tensor]:
        """The tensors of `layout` that another process of this host has allocated. Raises WeightSyncError."""
        return laid_out(self._others.at(handle), layout)

    def _buffer(self, size: int) -> _Buffer:
        """One that is free and large enough; otherwise a new one, in the place of one that is free."""
        self._largest = max(self._largest, size)
        if self._device.type != "cpu":
            return _Buffer(torch.empty(self._largest, dtype=torch.uint8, device=self._device))
        free = [buffer for buffer in self._buffers if buffer.free]
        fitting = [buffer for buffer in free if buffer.memory.nbytes >= size]
        if fitting:
            return min(fitting, key=lambda buffer: buffer.memory.nbytes)
        if free:
            self._buffers.remove(free[-1])
            free.clear()  # so that it is given back before the new one is made
        memory = new_shared(self._largest) if self.shared else None
        buffer = _Buffer(torch.empty(size, dtype=torch.uint8) if memory is None else memory)
        self._buffers.append(buffer)
        return buffer
