"""How far a phase is: a bar in a terminal, now and then a plain line in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_SECONDS = 30.0


@contextmanager
def progress(
    label: str, total: int, console: Console | None = None, plain_seconds: float = PLAIN_SECONDS
) -> Iterator[Callable[[int], None]]:
    """Yields `show(done)`. Without a terminal, a line is written at most every `plain_seconds`."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        yield _plain(label, total, console, plain_seconds)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(label, total=total)
        yield lambda done: bars.update(task, completed=done)


def _plain(label: str, total: int, console: Console, seconds: float) -> Callable[[int], None]:
    last = begun = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            console.print(f"{label}: {done}/{total} after {now - begun:.0f} s", soft_wrap=True, markup=False)

    return show
