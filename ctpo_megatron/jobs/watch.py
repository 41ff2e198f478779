"""`ctpo watch`: a run in a terminal, from its directory alone."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

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
    with _ended_by_signals():
        try:
            live.start(refresh=True)
            while True:
                time.sleep(every_s)
                view.look()
                live.refresh()
        finally:
            live.stop()  # also where the first frame is broken off: as a context it would leave the terminal as it is then


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A context that Ctrl-C and SIGTERM leave in order: the terminal is as it was then."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
