"""Seconds and bytes of something that runs on a device."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

FLUSH = 2**27  # bytes written before each timed call: more than a GPU's cache holds


def median_seconds(call: Callable[[], Any], device: str, *, repeats: int = 10, cold: bool = False) -> float:
    """Median time of `call`, after two calls that are not counted; on a GPU by the GPU's own clock.

    `cold`: what lies in the GPU's cache is written over before each call.
    """
    call()
    seconds = []
    with untraced():
        call()
        for _ in range(repeats):
            if cold and device == "cuda":
                torch.empty(FLUSH, dtype=torch.uint8, device=device).zero_()
            seconds.append(_seconds(call, device))
    return statistics.median(seconds)


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Inside it lines are not followed by `sys.settrace`, which takes time; see gpu_check_reached."""
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_seconds(nbytes: int, device: str) -> float:
    """Median time of a copy within the device that reads and writes `nbytes` together."""
    source = torch.ones(max(1, nbytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), device, cold=True)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that `call` holds on the GPU at one time beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before
