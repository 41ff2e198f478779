"""A process that calls a user's function for many attempts: `python -m ctpo_megatron.agents.play.worker PATH PER_WORKER`.

Reads JSON lines from stdin, first `{"options": {...}}`, then `{"number": 1, "task": {...}}` or `{"number": 1, "cancel": true}`,
and writes one for each task: `{"number": 1, "text": "...", "reward": null}` or `{"number": 1, "error": "..."}`. The first line
that it writes says `{"ready": true}`, or why there is no function. Whatever the function prints goes to stderr. It ends
with its stdin.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from ctpo_megatron.agents.play.task import AgentTask

MAX_LINE_BYTES = 1 << 26
CHECK = "--check"  # in place of PER_WORKER: say whether there is such a function, and end


def load(path: str, options: Mapping[str, Any]) -> Callable[[AgentTask], Any]:
    """Returns the function `package.module:function`, which gets `options` besides, or what a class made of them is when called.

    Raises whatever its import or its making raises, TypeError where it is no function or does not take `options`.
    """
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name)
    if isinstance(found, type):
        made = _fitting(path, found, options)()
        if not callable(made):
            raise TypeError(f"{path} is a class without __call__; needed: one whose objects are called with an AgentTask")
        return made.__call__
    if not callable(found):
        raise TypeError(f"{path} is a {type(found).__name__}; needed: a function of an AgentTask")
    return _fitting(path, found, options, None)


def _fitting(path: str, found: Callable[..., Any], options: Mapping[str, Any], *given: Any) -> Callable[..., Any]:
    """Returns `found` with `options`. Raises TypeError where it does not take them beside what is `given`."""
    with suppress(ValueError):  # of builtins, which have no signature
        try:
            inspect.signature(found).bind(*given, **options)
        except TypeError as error:
            names = ", ".join(options) or "none"  # their values may be secrets
            raise TypeError(f"{path} does not take rollout.agent.options ({names}): {error}") from None
    return partial(found, **options)


def answer_of(said: Any) -> dict[str, Any]:
    """Returns `text` and `reward` of what a function returned. Raises TypeError where that is none of what is allowed."""
    text, reward = said, None
    if isinstance(said, Mapping):
        if not set(said) <= {"text", "reward"}:
            raise TypeError(f"the function returned a dict with {', '.join(map(repr, said))}; needed: `text` and `reward`")
        text, reward = said.get("text"), said.get("reward")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"the function returned a {type(text).__name__}; needed: text, None, or a dict with `text` and `reward`")
    if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward)):
        raise TypeError(f"the function returned the reward {reward!r}; needed: a finite number, or None")
    return {"text": text, "reward": None if reward is None else float(reward)}


class _Worker:
    def __init__(self, function: Callable[[AgentTask], Any], threads: int, out: Any) -> None:
        self._function, self._out = function, out
        self._threads = ThreadPoolExecutor(threads)
        self._running: dict[int, asyncio.Task[None]] = {}

    async def serve(self, lines: asyncio.StreamReader) -> None:
        while line := await lines.readline():
            said = json.loads(line)
            number = said["number"]
            if "task" in said:
                self._running[number] = asyncio.create_task(self._play(number, AgentTask(**said["task"])))
            elif number in self._running:
                self._running[number].cancel()

    async def _play(self, number: int, task: AgentTask) -> None:
        try:
            if inspect.iscoroutinefunction(self._function):
                said = await self._function(task)
            else:
                said = await self._in_a_thread(task)
                if inspect.isawaitable(said):
                    said = await said
            answer = {"number": number, **answer_of(said)}
        except asyncio.CancelledError:
            answer = {"number": number, "error": "cancelled", "trace": ""}
        except BaseException as error:  # noqa: BLE001 - whatever a user's function raises is an answer
            answer = {"number": number, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        del self._running[number]
        self._out.write(json.dumps(answer) + "\n")

    async def _in_a_thread(self, task: AgentTask) -> Any:
        """What the function returns. A thread cannot be told to end: what is cancelled has ended only when its thread has."""
        asked = self._threads.submit(self._function, task)
        try:
            return await asyncio.wrap_future(asked)
        except asyncio.CancelledError:
            if not asked.cancelled():
                await asyncio.wait([asyncio.wrap_future(asked)])
            raise


def main() -> None:
    """Serve until stdin ends."""
    path, threads = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    try:
        function = load(path, json.loads(sys.stdin.buffer.readline())["options"])
    except BaseException as error:  # noqa: BLE001 - of a module of the user's
        out.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        traceback.print_exc()
        sys.exit(1)
    out.write(json.dumps({"ready": True}) + "\n")
    if threads != CHECK:
        asyncio.run(_serve(function, int(threads), out))
        os._exit(0)  # threads that hang in the user's function keep nothing alive


async def _serve(function: Callable[[AgentTask], Any], threads: int, out: Any) -> None:
    lines = asyncio.StreamReader(MAX_LINE_BYTES)
    protocol = asyncio.StreamReaderProtocol(lines)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    await _Worker(function, threads, out).serve(lines)


if __name__ == "__main__":
    main()
