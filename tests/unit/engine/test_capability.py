"""Which GPUs a server with weights in fp8 is refused on; answers stand for the driver's."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ctpo_megatron.engine.capability import Gpu, check_fp8, visible_gpus
from ctpo_megatron.errors import InputError


class NVMLError(Exception):
    """As of pynvml."""


def unknown(_index: int) -> Any:
    raise NVMLError("not supported")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: ("index", index),
        nvmlDeviceGetHandleByUUID=lambda uuid: ("uuid", uuid),
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0) if handle[0] == "index" else (8, 0),
        nvmlDeviceGetName=lambda handle: f"GPU {handle[1]}",
    )
    monkeypatch.setitem(sys.modules, "pynvml", found)
    return found


def test_the_gpus_that_a_server_sees(driver: SimpleNamespace) -> None:
    """By number or by UUID; none where the driver does not know."""
    given = {"CUDA_VISIBLE_DEVICES": "3, GPU-7b"}
    assert visible_gpus(given) == [Gpu("GPU 3", (9, 0)), Gpu("GPU GPU-7b", (8, 0))]
    assert visible_gpus({}) == []
    driver.nvmlDeviceGetName = unknown
    assert visible_gpus(given) == []
    driver.nvmlInit = lambda: unknown(0)
    assert visible_gpus(given) == []


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_those_that_keep_what_was_sent(capability: tuple[int, int]) -> None:
    check_fp8([Gpu("a GPU", capability)])


@pytest.mark.parametrize(
    ("capability", "why"),
    [((8, 0), "has no fp8"), ((8, 6), "has no fp8"), ((10, 0), "round scales anew"), ((12, 0), "round scales anew")],
)
def test_others_are_refused_by_name(capability: tuple[int, int], why: str) -> None:
    with pytest.raises(
        InputError, match=rf"B-what \(compute capability {capability[0]}.{capability[1]}\).*{why}.*9.0 \(Hopper\)"
    ):
        check_fp8([Gpu("H100", (9, 0)), Gpu("B-what", capability)])
