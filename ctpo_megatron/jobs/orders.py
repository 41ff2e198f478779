"""Where the orders of a run come from: signals, files in its directory, and the end of its allocation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from ctpo_megatron.loop.orders import Orders, StopRequest

STOP_FILE, SAVE_FILE = "STOP", "SAVE"
FILES_EVERY_S = 1.0
TIME_EVERY_S = 5.0


def on_signal(orders: Orders, name: str, grace_s: float) -> None:
    """Let the run stop because the signal called `name` has come. After SIGTERM it has `grace_s`."""
    orders.stop(StopRequest(name, grace_s if name == "SIGTERM" else None))


async def watch_files(orders: Orders, run_dir: Path) -> None:
    """Obey the files STOP and SAVE in `run_dir`, and remove each that was seen; returns never."""
    while True:
        if await asyncio.to_thread(_taken, run_dir / STOP_FILE):
            orders.stop(StopRequest(f"the file {run_dir / STOP_FILE}"))
        if await asyncio.to_thread(_taken, run_dir / SAVE_FILE):
            orders.save()
        await asyncio.sleep(FILES_EVERY_S)


async def watch_time(orders: Orders, ends_at: float, lead_s: Callable[[], float]) -> None:
    """Let the run stop `lead_s` seconds before `ends_at`, in seconds since 1970; the lead may grow as the run learns."""
    while time.time() < ends_at - lead_s():
        await asyncio.sleep(TIME_EVERY_S)
    left = ends_at - time.time()
    orders.stop(StopRequest(f"the allocation ends in {left:.0f} s", left))


def _taken(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
