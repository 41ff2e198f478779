"""Waiting until the GPUs that a dead server has left are given back by the driver.

A process that is killed takes a moment to give its GPU memory back, seconds where it was large. SGLang sizes its cache by what it
finds free when it starts, and ends where that is too little: a server that is started again must not be too early.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping

SETTLED_S = 3.0  # without any fall of the memory in use
TIMEOUT_S = 60.0
POLL_S = 0.25

logger = logging.getLogger(__name__)


def wait_until_settled(used_bytes: Callable[[], int], settled_s: float, timeout_s: float) -> bool:
    """Whether the memory in use has stopped falling: it has not for `settled_s`. Returns after `timeout_s` at the latest.

    It is not waited for a GPU that is empty: a trainer, or a server of another run, may be on it.
    """
    begin = fallen = time.monotonic()
    least = used_bytes()
    while time.monotonic() - fallen < settled_s:
        if time.monotonic() - begin > timeout_s:
            return False
        time.sleep(POLL_S)
        now = used_bytes()
        if now < least:
            least, fallen = now, time.monotonic()
    return True


def wait_for_gpus(environment: Mapping[str, str] = os.environ) -> None:
    """Wait until memory in use on the GPUs of CUDA_VISIBLE_DEVICES in `environment` has stopped falling, a bounded time.

    Where the driver's library does not answer, or the GPUs are not named, it is not waited for.
    """
    import pynvml  # type: ignore[import-untyped]  # it has no types; it comes with SGLang, and is of use only where GPUs are

    names = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.warning("the memory of GPUs %s is not waited for: %s", names, error)
        return
    try:
        gpus = [
            pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in names
        ]
        if not wait_until_settled(lambda: sum(pynvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in gpus), SETTLED_S, TIMEOUT_S):
            logger.warning("memory of GPUs %s was still being given back after %.0f s", names, TIMEOUT_S)
    except pynvml.NVMLError as error:
        logger.warning("the memory of GPUs %s is not waited for: %s", names, error)
    finally:
        pynvml.nvmlShutdown()
