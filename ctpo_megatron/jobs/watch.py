"""`ctpo watch`: a run in a terminal, from its directory alone."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

from rich.console import Console
from rich.live import Live

from ctpo_megatron.report.watch.frame import Frame
from ctpo_megatron.report.watch.view import View


def watch_job(run_dir: Path, *, once: bool, every_s: float, console: Console | None = None) -> None:
    """Show the run until Ctrl-C; one frame with `once`, and where the output is no terminal.

    Raises InputError where the directory is none of a run.
    """
    console, view = console or Console(), View(run_dir)
    view.check()
    view.look()
    if once or not console.is_terminal:
        console.print(Frame(view, whole=True))
        return
    live = Live(Frame(view), console=console, screen=True, auto_refresh=False)
    asyncio.run(_show(live, view, every_s))


async def _show(live: Live, view: View, every_s: float) -> None:
    """Show a new frame each `every_s` seconds until Ctrl-C or SIGTERM; the terminal is then as it was.

    Signals are heard between two frames. An exception raised by one could be lost, or break the terminal, wherever it strikes.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        live.start(refresh=True)
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), every_s)
                return
            view.look()
            live.refresh()
    finally:
        live.stop()  # also where the first frame fails: as a context it would leave the terminal as it is then
