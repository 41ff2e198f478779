"""Memory that the ranks of one host map together, so that pieces of weights need not go through a socket.

The files are torch's own, as for tensors that processes hand to each other by name: a helper of torch's removes them when all who
have mapped one are gone, also where they were killed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, UntypedStorage

from ctpo_megatron.errors import WeightSyncError

FILES = Path("/dev/shm")
BOOT = Path("/proc/sys/kernel/random/boot_id")
MAPPED = 3  # pieces of others' memory that stay mapped: a sender has two buckets under way, and a third where sizes differ
RESERVE = 0.25  # of all shared memory: left to others, as Ray and SGLang, which end where they find it full


@dataclass(frozen=True, slots=True)
class Handle:
    """What another process of the host needs to map a piece of shared memory."""

    manager: str  # socket of torch's helper
    name: str  # of the file
    nbytes: int


def domain() -> str:
    """What is the same in processes that can map each other's shared memory: host, directories, user. Empty where there is none.

    torch's helper listens in the directory of temporary files.
    """
    try:
        places = [path.stat() for path in (FILES, Path(tempfile.gettempdir()))]
        boot = BOOT.read_text().strip()
    except OSError:
        return ""
    return " ".join([boot, *(f"{place.st_dev}:{place.st_ino}" for place in places), str(os.getuid())])


@functools.cache
def start_helper() -> None:
    """Let torch's helper, which is started with the first shared memory, inherit no socket of this process.

    It lives as long as anybody has memory of this process mapped. With gloo's sockets open in it, ranks that wait for this one
    would not notice its death (torch 2.14; findings/torch_shared_memory_sockets.sh).
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the directory
            if (number := int(name)) > 2:
                os.set_inheritable(number, False)
    UntypedStorage._new_using_filename_cpu(1)


def new_shared(size: int) -> Tensor | None:
    """[size] uint8 in shared memory; None where there is no room for it, as in a container with 64 MB of it."""
    room = shutil.disk_usage(FILES)
    if room.free - size < RESERVE * room.total:
        return None
    try:
        start_helper()
        storage = UntypedStorage._new_using_filename_cpu(size)
    except RuntimeError:  # torch takes all pages at once, so nothing fails later; or its helper does not start
        return None
    return _bytes(storage)


def handle_of(tensor: Tensor) -> Handle | None:
    """The handle of the whole memory that `tensor` lies in, which has to be kept until all have mapped it; None where it is not
    shared."""
    storage = tensor.untyped_storage()
    if not storage.is_shared() or storage.device.type != "cpu":
        return None
    manager, name, size = storage._share_filename_cpu_()
    return Handle(manager.decode(), name.decode(), size)


class Mapped:
    """Maps the memory of other processes, and keeps what was mapped last."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def at(self, handle: Handle) -> Tensor:
        """[n] uint8: the memory. Raises WeightSyncError where it cannot be mapped."""
        memory = self._kept.pop(handle.name, None)
        if memory is None:
            try:
                memory = _bytes(
                    UntypedStorage._new_shared_filename_cpu(handle.manager.encode(), handle.name.encode(), handle.nbytes)
                )
            except RuntimeError as error:
                raise WeightSyncError(f"memory {handle.name} of another rank of this host cannot be mapped: {error}") from error
        self._kept[handle.name] = memory
        for name in list(self._kept)[:-MAPPED]:
            del self._kept[name]
        return memory


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
