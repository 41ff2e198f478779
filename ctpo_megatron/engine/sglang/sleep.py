"""Lets an unpatched SGLang give back its memory, and take it again, on hosts without a GPU.

SGLang's memory saver is for GPUs: it unmaps memory and maps other memory at the same addresses. Elsewhere SGLang 0.5.23 keeps
everything, and `/release_memory_occupation` ends the server, which waits for a CUDA device that is not there. Two hooks of
SGLang's plugin framework mend that: the memory saver gives the pages of weights and KV cache to the system, which has zeros for
the next touch of an address; and there is no device to wait for. tests/integration/test_sleep.py tells when this is no longer
needed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner

TARGET = "sglang.srt.managers.scheduler.Scheduler.init_weight_updater"
WAIT = "torch.cuda.synchronize"

Span = tuple[int, int]  # addresses: the first, and the one after the last


def register() -> None:
    """Call it before `load_plugins`, which applies what is registered. Does nothing where torch sees a CUDA device."""
    if not torch.cuda.is_available():
        HookRegistry.register(TARGET, save_memory, HookType.AFTER)
        HookRegistry.register(WAIT, do_not_wait, HookType.REPLACE)


def save_memory(_result: None, scheduler: Scheduler) -> None:
    """Put our memory saver in the place of the one that saves nothing."""
    scheduler.weight_updater.memory_saver_adapter = PageSaver(scheduler.tp_worker.model_runner)


def do_not_wait(_device: object = None) -> None:
    """Return at once: there is no device."""


class PageSaver:
    """What SGLang's weight updater asks of a `TorchMemorySaverAdapter`, for memory of the host."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def pause(self, tag: str) -> None:
        """Give back the whole pages of `tag`; what was in them is zero from now on. Graphs there are none."""
        if tag == GPU_MEMORY_TYPE_WEIGHTS:
            give_back(_weights(self._runner.model))
        elif tag == GPU_MEMORY_TYPE_KV_CACHE:
            addresses, sizes, _ = self._runner.token_to_kv_pool.get_contiguous_buf_infos()
            give_back([(address, address + size) for address, size in zip(addresses, sizes, strict=True)])

    def resume(self, _tag: str) -> None:
        """Nothing to do: the system gives a page when an address is touched."""


def _weights(model: torch.nn.Module) -> list[Span]:
    """The storages of all parameters, once each; not those that a buffer shares, which SGLang expects to find as they are."""
    kept = {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return sorted({(each.data_ptr(), each.data_ptr() + each.nbytes()) for each in storages if each.data_ptr() not in kept})


def give_back(spans: list[Span]) -> None:
    """Give the whole pages inside each span to the system, where they are this process's own and no file's. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = list(_own_memory())
    for first, last in spans:
        for begin, end in own:
            begin = -(-max(first, begin) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = min(last, end) // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end and libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}")


def _own_memory() -> Iterator[Span]:
    """The spans of this process's private memory that is not a file's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _offset, _device, inode = line.split(maxsplit=5)[:5]
        if rights.endswith("p") and inode == "0":
            first, last = span.split("-")
            yield int(first, 16), int(last, 16)
