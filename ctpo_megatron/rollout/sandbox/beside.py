"""Work of a second or less, in an event loop of its own, for callers that have none and for those that are within one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def beside(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises. The caller waits."""
    with ThreadPoolExecutor(1, "beside") as thread:
        return thread.submit(asyncio.run, work).result()
