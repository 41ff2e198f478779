"""Requests to one inference server, each bounded in time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp

from ctpo_megatron.errors import EngineError, EngineRefused

RETRIES = 5
BACKOFF_S = 0.2


class Requests:
    """A pool of connections with the run's key; used as an async context manager.

    Connection errors and answers of 500 and above are tried again with growing pauses, then raised as EngineError. So is
    silence for `timeout_s`, at once. Answers of 400 to 499 raise EngineRefused at once.
    """

    def __init__(self, api_key: str, timeout_s: float) -> None:
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._timeout_s = timeout_s
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Requests:
        connector = aiohttp.TCPConnector(limit=0)  # the caller bounds what is in flight
        self._http = aiohttp.ClientSession(headers=self._headers, connector=connector)
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._http.close()

    async def get(self, url: str, *, timeout_s: float | None = None) -> Any:
        """The decoded answer."""
        return await self._request("GET", url, None, timeout_s or self._timeout_s)

    async def post(self, url: str, body: dict[str, Any], *, timeout_s: float | None = None) -> Any:
        """The decoded answer."""
        return await self._request("POST", url, body, timeout_s or self._timeout_s)

    async def _request(self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        limit = aiohttp.ClientTimeout(total=timeout_s)
        for attempt in range(RETRIES):
            try:
                async with self._http.request(method, url, json=body, timeout=limit) as answer:
                    text = await answer.text()
                    if answer.status < 400:
                        return json.loads(text) if answer.content_type == "application/json" else text
                    problem = f"answered {answer.status}: {text[:500]}"
                    if answer.status < 500:
                        raise EngineRefused(f"{url} {problem}")
            except TimeoutError:
                raise EngineError(f"{url} did not answer within {timeout_s:.0f} s") from None
            except aiohttp.ClientError as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < RETRIES - 1:
                await asyncio.sleep(BACKOFF_S * 2**attempt)
        raise EngineError(f"{url} {problem}")
