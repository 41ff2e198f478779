"""RUN_DIR/now.json: what a run is doing at this moment, replaced every two seconds while its processes are up.

It is for whoever looks at the run directory, such as `ctpo watch`. Nothing is read back by the run, and nothing depends on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ctpo_megatron.record.heartbeat import Stage

NAME = "now.json"
EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Doing:
    """A stage that a process is in. `step`: None where it belongs to none. `silent_s`: since its last sign of life."""

    name: str
    step: int | None
    detail: str
    seconds: float
    silent_s: float
    waits_for: str = ""


@dataclass(frozen=True, slots=True)
class ProcessNow:
    """A rank of the trainer. `unanswered_s`: since it was last heard; empty `doing`: it waits to be told."""

    name: str
    doing: tuple[Doing, ...]
    unanswered_s: float


@dataclass(frozen=True, slots=True)
class ServerNow:
    """An inference server. What it says of itself is None where it was not asked yet."""

    name: str
    state: str
    version: int | None
    in_flight: int  # requests at it, by the driver's count
    limit: int | None  # of these
    running: int | None = None
    waiting: int | None = None  # in its queue
    cache_use: float | None = None  # share of its KV cache
    aside: bool = False
    reason: str = ""  # why it does not serve


@dataclass(frozen=True, slots=True)
class Now:
    """What a run is doing. `time`: when, seconds since 1970. `waits`: how many tasks wait for what, and the longest wait."""

    time: float
    driver: tuple[Doing, ...] = ()
    loop_lag_s: float = 0.0
    ranks: tuple[ProcessNow, ...] = ()
    servers: tuple[ServerNow, ...] = ()
    waits: Mapping[str, tuple[int, float]] = field(default_factory=dict)


def doings(stages: Iterable[Stage]) -> tuple[Doing, ...]:
    """Returns stages as they stand in the file."""
    return tuple(
        Doing(each.name, each.step, each.detail, round(each.seconds, 3), round(each.silent_s, 3), each.waits_for)
        for each in stages
    )


def write_now(path: Path, now: Now) -> None:
    """Replace the file in one step, without waiting for the disk. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(msgspec.json.encode(now))
    os.replace(part, path)


def read_now(path: Path) -> Now | None:
    """Returns what the file says; None where there is none, or it cannot be read now."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Now)
    except (OSError, msgspec.MsgspecError):
        return None


@contextlib.asynccontextmanager
async def kept_now(path: Path, look: Callable[[], Now], every_s: float = EVERY_S) -> AsyncIterator[None]:
    """A context in which the file is replaced every `every_s` by what `look` returns.

    A disk that does not take it is not waited for: the next one is written later. `look` is called in the event loop.
    """

    async def write_on() -> None:
        while True:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(write_now, path, look())
            await asyncio.sleep(every_s)

    writing = asyncio.ensure_future(write_on())
    try:
        yield
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


def age_s(now: Now, at: float | None = None) -> float:
    """Returns how long ago it was so, in seconds, by the clock of whoever reads it."""
    return max(0.0, (time.time() if at is None else at) - now.time)
