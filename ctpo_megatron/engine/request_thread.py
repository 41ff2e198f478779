"""Requests for callers without an event loop: a thread runs one for them."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import aiohttp

from ctpo_megatron.engine.http import Answer, Failure, Method, ask, open_session

OPEN_TIMEOUT_S = 30.0  # for the thread to run its first step, on a busy machine
CLOSE_TIMEOUT_S = 5.0  # for cancelled requests to let their connections go


class RequestThread:
    """A thread that asks servers with the run's key, any number at once, each request once. Close it after use."""

    def __init__(self, api_key: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()
        self._session = asyncio.run_coroutine_threadsafe(_opened(api_key), self._loop).result(OPEN_TIMEOUT_S)

    def submit(self, method: Method, url: str, body: dict[str, Any] | None, timeout_s: float) -> Future[Answer | Failure]:
        """The answer to come, within `timeout_s`: see `http.ask`."""
        return asyncio.run_coroutine_threadsafe(ask(self._session, method, url, body, timeout_s), self._loop)

    def close(self) -> None:
        """Cancel what is under way and end the thread. Safe to call twice."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            self._thread.join(CLOSE_TIMEOUT_S)
            if not self._thread.is_alive():
                self._loop.close()

    async def _end(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._session.close()
        self._loop.stop()


async def _opened(api_key: str) -> aiohttp.ClientSession:
    return open_session(api_key, reuse=False)
