"""Whether a server's GPUs keep weights in fp8 as they are sent, from reading SGLang 0.5.23; no GPU has run it.

Older GPUs than those of `KEPT` have no fp8, and SGLang packs the weights anew for its Marlin kernels. On newer ones its DeepGEMM
rounds the scales to powers of two, and the weights with them. Either way the server would hold other bytes than were sent.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctpo_megatron.errors import InputError

Capability = tuple[int, int]
KEPT: dict[Capability, str] = {(8, 9): "Ada", (9, 0): "Hopper"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as the driver knows it."""

    name: str
    capability: Capability


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs of CUDA_VISIBLE_DEVICES in `environment`; none where the driver's library does not answer."""
    import pynvml  # type: ignore[import-untyped]  # it has no types; it comes with SGLang, and is of use only where GPUs are

    names = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.warning("the kind of GPUs %s is not known: %s", names, error)
        return []
    try:
        return [_gpu(pynvml, name) for name in names]
    except pynvml.NVMLError as error:
        logger.warning("the kind of GPUs %s is not known: %s", names, error)
        return []
    finally:
        pynvml.nvmlShutdown()


def check_fp8(gpus: list[Gpu]) -> None:
    """Raises InputError for a GPU on which a server would not keep weights in fp8 as they are sent."""
    for gpu in gpus:
        if gpu.capability not in KEPT:
            have = "has no fp8, and SGLang packs such weights anew" if gpu.capability < (8, 9) else "has SGLang round scales anew"
            allowed = ", ".join(f"{major}.{minor} ({kind})" for (major, minor), kind in KEPT.items())
            raise InputError(
                f"weights.quantization=fp8: {gpu.name} (compute capability {gpu.capability[0]}.{gpu.capability[1]}) {have}: "
                f"its server would hold other bytes than were published. Allowed are {allowed}; set weights.quantization=null"
            )


def _gpu(driver: Any, name: str) -> Gpu:
    handle = driver.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else driver.nvmlDeviceGetHandleByUUID(name)
    major, minor = driver.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(driver.nvmlDeviceGetName(handle), (major, minor))
