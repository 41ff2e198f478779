"""A user's reward function in a process of its own, which its caller may end; see `rewards.function`.

    python -m ctpo_megatron.rollout.rewards.function_process package.module:function TIMEOUT_S MEMORY_MB

Reads a line of JSON for each answer and writes one for each verdict: the seconds that it took, and {"reward": ..., "terms": ...}
or {"why": ...}. What the function prints goes to stderr, and it has nothing to read. One that waits (async) is ended here,
one that works or hangs by the caller.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from ctpo_megatron.rollout.rewards.numbers import numbers_of

GRACE_S = 5
SHOWN = 500  # characters of an error
MAX_GIVEN_CHARS = 1000
OWN_KEYS = ("reward", "accuracy", "given")


def load(path: str) -> Callable[[dict[str, Any]], Any]:
    """Returns the function `package.module:function`. Raises whatever its module raises, and TypeError."""
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise TypeError(f"{path} is a {type(found).__name__}; needed: a function")
    return found


async def judged(function: Callable[[dict[str, Any]], Any], sample: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Returns what `function` says of an answer, or why it says nothing that can be used."""
    try:
        async with asyncio.timeout(timeout_s) as limit:
            found = function(sample)
            if inspect.isawaitable(found):
                found = await found
    except MemoryError:
        return {"why": "it needed more memory than rollout.reward.memory_mb"}
    except TimeoutError as error:
        return {"why": f"no end within {timeout_s:g} s" if limit.expired() else _words(error)}
    except Exception as error:  # noqa: BLE001 - whatever a user's function raises is said of this answer
        return {"why": _words(error)}
    return usable(found)


def usable(found: Any) -> dict[str, Any]:
    """Returns what a function returned as a verdict, or why it is none."""
    parts = found if isinstance(found, Mapping) else {"reward": found}
    kind = "a dict without `reward`" if isinstance(found, Mapping) else repr(found)[:80]
    numbers = numbers_of({key: parts[key] for key in ("reward", "accuracy") if parts.get(key) is not None})
    if "reward" not in numbers:
        return {"why": f"it returned {parts.get('reward', kind)!r:.80}; needed: a finite number, or a dict with one as `reward`"}
    terms = numbers_of({str(key): value for key, value in parts.items() if key not in OWN_KEYS})
    given = parts.get("given")
    return {**numbers, "terms": terms, "given": given if given is None else str(given)[:MAX_GIVEN_CHARS]}


def _words(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"it raised {type(error).__name__}: {str(error)[:SHOWN]}{place}"


async def _serve(function: Callable[[dict[str, Any]], Any], timeout_s: float, requests: TextIO, answers: TextIO) -> None:
    for line in requests:  # one at a time: nothing else is to run meanwhile
        signal.alarm(math.ceil(timeout_s) + GRACE_S)  # ends this process, should its caller be gone
        begin = time.monotonic()
        verdict = await judged(function, json.loads(line), timeout_s)
        signal.alarm(0)
        print(f"{time.monotonic() - begin:.6f} {json.dumps(verdict)}", file=answers, flush=True)


def main(path: str, timeout_s: str, memory_mb: str) -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; our caller ends us
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_mb) << 20, int(memory_mb) << 20))
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints may not be read as a verdict
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # nor may a program that it starts read the next answers
    try:
        function = load(path)
    except BaseException as error:  # noqa: BLE001 - whatever a user's module raises, its caller is told
        traceback.print_exc()
        print(" ".join(f"{type(error).__name__}: {error}".split())[:SHOWN], file=answers, flush=True)
        raise SystemExit(1) from None
    print("ready", file=answers, flush=True)
    asyncio.run(_serve(function, float(timeout_s), requests, answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
