"""Where the orders of a run come from: signals, and files in its directory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import CtpoError, RayLost
from ctpo_megatron.jobs.stop import StopSignal
from ctpo_megatron.jobs.time_limit import Lead, time_limit
from ctpo_megatron.loop.orders import Orders, StopRequest
from ctpo_megatron.record.events import Emit
from ctpo_megatron.record.run_events import StopRequested
from ctpo_megatron.record.storage import Storage

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


@asynccontextmanager
async def obey(
    stop: StopSignal, config: RunConfig, run_dir: Path, storage: Storage, emit: Emit, lead: Lead
) -> AsyncIterator[Orders]:
    """Orders that hear of signals, of files and of the job's time limit. Inside it the run is given up when a stop takes longer
    than it may."""
    limit, grace_s = asyncio.timeout(None), config.cluster.stop_grace_s

    def on_stop(request: StopRequest) -> None:
        storage.stop()
        emit(StopRequested(request.reason))
        if request.within_s is not None:
            limit.reschedule(asyncio.get_running_loop().time() + request.within_s)

    orders = Orders(on_stop)
    try:
        async with limit:
            stop.listen(partial(on_signal, orders, grace_s=grace_s))
            watches = [asyncio.ensure_future(watch_files(orders, run_dir))]
            if (job := time_limit(lead, grace_s, emit)) is not None:
                watches.append(asyncio.ensure_future(job.watch(orders)))
            try:
                yield orders
            finally:
                stop.listen(None)
                for watch in watches:
                    watch.cancel()
                await asyncio.gather(*watches, return_exceptions=True)
    except TimeoutError as error:
        if not limit.expired():
            raise
        if orders.stop_request is not None and orders.stop_request.again:
            raise RayLost(f"{orders.stop_request.reason}, and what was learned since the newest checkpoint") from error
        raise CtpoError("what was learned since the newest checkpoint could not be saved in the time that was left") from error


def _taken(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return os.path.exists(path)
    return True
