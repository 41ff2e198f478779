"""Waiting for calls on several Ray actors: the first failure ends the wait, and the cause is told from its consequences."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

from ctpo_megatron.cluster.logs import tail
from ctpo_megatron.errors import CtpoError, ProcessDied

PEERS_FAIL_WITHIN_S = 3.0  # after one rank has failed; when it died, its peers may tell so before its own death is known


@dataclass(frozen=True)
class Process:
    """An actor and what to call it in an error."""

    name: str
    actor: Any
    log_path: Path


async def call_all(
    calls: list[tuple[Process, ray.ObjectRef]], timeout_s: float | None, lost: type[ProcessDied] = ProcessDied
) -> list[Any]:
    """Results in order. Raises the most telling error as soon as one call fails, `lost` for a death and when time runs out."""
    if not calls:
        return []
    futures = [asyncio.wrap_future(ref.future()) for _, ref in calls]
    try:
        _, pending = await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        failed = [f.exception() for f in futures if f.done() and not f.cancelled() and f.exception()]
        if failed and pending and not any(isinstance(error, ActorDiedError) for error in failed):  # which is the cause itself
            await asyncio.wait(pending, timeout=PEERS_FAIL_WITHIN_S)
        errors = [
            (process, error)
            for (process, _), future in zip(calls, futures, strict=True)
            if future.done() and (error := future.exception()) is not None
        ]
        if errors:
            raise explain(*max(errors, key=lambda each: _weight(each[1])), lost)
        if pending:
            late = [process for (process, _), future in zip(calls, futures, strict=True) if not future.done()]
            raise lost(
                f"no answer from {', '.join(p.name for p in late)} within {timeout_s:.0f} s; "
                f"logs: {', '.join(str(p.log_path) for p in late)}"
            )
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


async def first_of(waits: list[Coroutine[Any, Any, Any]]) -> None:
    """Return when the first of `waits` does, or raise its error; the others are cancelled. At least one is needed."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def explain(process: Process, error: BaseException, lost: type[ProcessDied] = ProcessDied) -> CtpoError:
    """The error of one process as a message for a person, with its log; `lost` where none of ours tells what it was."""
    where = f"log: {process.log_path}"
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, CtpoError):
        cause.args = (f"{process.name}: {cause}\n{where}",)
        return cause
    if isinstance(error, RayActorError):
        last = tail(process.log_path)
        return lost(f"{process.name} died: {_reason(error)}\n{where}" + (f"\n{last}" if last else ""))
    return lost(f"{process.name} failed: {type(cause).__name__}: {cause}\n{where}")


def _reason(error: RayActorError) -> str:
    for line in str(error).splitlines():
        if "died" in line or "exit" in line or "killed" in line:
            return line.strip()
    return str(error).splitlines()[0]


def _weight(error: BaseException) -> int:
    """How likely this is the cause and not a consequence: deaths, then our own errors, then others; below, in the same order,
    what tells of a lost connection, such as the log of a server's part whose other part has died."""
    if isinstance(error, (ActorDiedError, ActorUnavailableError)):
        return 4
    cause = error.cause if isinstance(error, RayTaskError) else error
    lost = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out")
    return isinstance(cause, CtpoError) + 2 * (not any(word in str(cause).lower() for word in lost))
