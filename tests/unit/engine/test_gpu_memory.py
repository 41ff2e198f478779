"""A server is started again only when its GPUs' memory has stopped coming back; readings stand for the driver's."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ctpo_megatron.engine import gpu_memory
from ctpo_megatron.engine.gpu_memory import wait_for_gpus, wait_until_settled


class NVMLError(Exception):
    """As of pynvml."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_memory, "POLL_S", 0.01)


def readings(*values: int) -> Iterator[int]:
    """The values, then the last one for ever."""
    return itertools.chain(values, itertools.repeat(values[-1]))


def test_waits_while_memory_is_given_back() -> None:
    """Also where it stands still for a moment; a trainer that takes some does not matter."""
    used = readings(80, 80, 60, 60, 60, 9, 12, 12)
    begin = time.monotonic()
    assert wait_until_settled(lambda: next(used), settled_s=0.2, timeout_s=20)
    assert next(used) == 12
    assert time.monotonic() - begin >= 0.2


def test_the_wait_is_bounded() -> None:
    used = itertools.count(10**6, -1)
    begin = time.monotonic()
    assert not wait_until_settled(lambda: next(used), settled_s=0.5, timeout_s=0.3)
    assert time.monotonic() - begin < 5


def driver(**replaced: Any) -> tuple[SimpleNamespace, list[Any]]:
    """A library of the driver, and what it was asked."""
    asked: list[Any] = []
    found = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: asked.append("init"),
        "nvmlShutdown": lambda: asked.append("shutdown"),
        "nvmlDeviceGetHandleByIndex": lambda index: asked.append(index) or index,
        "nvmlDeviceGetHandleByUUID": lambda uuid: asked.append(uuid) or uuid,
        "nvmlDeviceGetMemoryInfo": lambda _gpu: SimpleNamespace(used=2**30),
    }
    return SimpleNamespace(**found | replaced), asked


def test_the_gpus_that_the_server_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_memory, "SETTLED_S", 0.0)
    library, asked = driver()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    wait_for_gpus({"CUDA_VISIBLE_DEVICES": "3,GPU-8f"})
    assert asked == ["init", 3, "GPU-8f", "shutdown"]


def test_without_a_driver_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NVMLError("no driver")

    library, asked = driver(nvmlInit=missing)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    wait_for_gpus({"CUDA_VISIBLE_DEVICES": "0"})
    assert asked == []
