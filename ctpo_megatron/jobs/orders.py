"""Where the orders of a run come from: signals, and files in its directory."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from ctpo_megatron.loop.orders import Orders, StopRequest

STOP_FILE, SAVE_FILE = "STOP", "SAVE"
FILES_EVERY_S = 1.0


def on_signal(orders: Orders, name: str, grace_s: float) -> None:
    """Let the run stop because the signal called `name` has come. After SIGTERM it has `grace_s`."""
    orders.stop(StopRequest(name, grace_s if name == "SIGTERM" else None))


async def watch_files(orders: Orders, run_dir: Path) -> None:
    """Obey the files STOP and SAVE in `run_dir`, and remove each that was seen; returns never.

    One that cannot be removed, on a disk that is read-only by now, is obeyed too.
    """
    while True:
        if await asyncio.to_thread(_taken, run_dir / STOP_FILE):
            orders.stop(StopRequest(f"the file {run_dir / STOP_FILE}"))
        if await asyncio.to_thread(_taken, run_dir / SAVE_FILE):
            orders.save()
        await asyncio.sleep(FILES_EVERY_S)


def _taken(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return os.path.exists(path)
    return True
