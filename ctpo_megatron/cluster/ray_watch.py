"""Whether Ray's own processes live, in a cluster that the run has started for itself.

Ray ends a driver a minute after its GCS has died, and tells of a dead raylet after a quarter of one. Until then a run would go on
without knowing: both are looked at twice a second instead.
"""

from __future__ import annotations

import asyncio
from typing import Literal

import psutil
from ray._private import worker

POLL_S = 0.5

Part = Literal["gcs_server", "raylet"]
PARTS: tuple[Part, ...] = ("gcs_server", "raylet")


def ray_processes() -> dict[Part, psutil.Process]:
    """Returns the processes of the cluster that this driver has started; none where it joined another one."""
    node = worker._global_node
    if node is None or not node.is_head():
        return {}
    started = {part: node.all_processes.get(part, []) for part in PARTS}
    return {part: psutil.Process(infos[0].process.pid) for part, infos in started.items() if infos}


async def ended(process: psutil.Process | None) -> None:
    """Return when `process` has ended, never where there is none. One that is stopped is ended by `watch`."""
    while process is None or alive(process):
        await asyncio.sleep(POLL_S)


def alive(process: psutil.Process) -> bool:
    """Whether a process has not ended."""
    return _status(process) not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def _status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD
