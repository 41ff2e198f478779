"""How far a phase is: a bar in a terminal, now and then a plain line in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_SECONDS = 30.0
PATIENCE_SECONDS = 2.0  # that a person waits without being told what for


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


@contextmanager
def reading_progress(
    label: str, console: Console | None = None, patience_s: float = PATIENCE_SECONDS, plain_seconds: float = PLAIN_SECONDS
) -> Iterator[Callable[[int, int], None]]:
    """Yields `show(done, total)` for work before a run that is mostly quick: nothing is shown in the first `patience_s`.

    Then a bar with percentages stands on stderr; where that is no terminal, a line is written at most every `plain_seconds`.
    """
    console = console or Console(highlight=False, stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True)
    task = bars.add_task(label, total=None)
    begun = time.monotonic()
    due = begun + patience_s

    def show(done: int, total: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due:
            return
        if console.is_terminal:
            bars.start()
            bars.update(task, completed=done, total=total)
            return
        due = now + plain_seconds
        console.print(f"{label}: {done / max(total, 1):.0%} after {now - begun:.0f} s", soft_wrap=True, markup=False)

    try:
        yield show
    finally:
        if console.is_terminal:
            bars.stop()
