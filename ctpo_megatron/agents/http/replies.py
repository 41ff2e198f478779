"""How an answer is brought: within a bound of time, and with signs of life while it is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping

from aiohttp import web

from ctpo_megatron.agents.http.dialects import Dialect
from ctpo_megatron.agents.http.limits import Limits
from ctpo_megatron.agents.http.refusals import Refusal

FIXED = {"Server": "ctpo", "Cache-Control": "no-store"}
_JSON = "application/json"
_EVENTS = "text/event-stream"


class Reply:
    """The answer to one request. Until `keep_alive` is called nothing of it is sent, so an error still has its own status."""

    def __init__(
        self, request: web.BaseRequest, dialect: Dialect, limits: Limits, headers: Mapping[str, str], *, stream: bool
    ) -> None:
        self._request = request
        self._dialect = dialect
        self._limits = limits
        self._headers = {**FIXED, **headers, "Content-Type": _EVENTS if stream else _JSON}
        self._stream = stream
        self._begun: web.StreamResponse | None = None

    @property
    def begun(self) -> bool:
        """Returns whether something was sent, so that the status is said."""
        return self._begun is not None

    async def keep_alive(self) -> None:
        """Send a sign of life that its client does not see: a comment or ping in a stream, else a space before the JSON."""
        if self._begun is None:
            self._begun = web.StreamResponse(headers=self._headers)
            await self._bounded(self._begun.prepare(self._request))
        await self._bounded(self._begun.write(self._dialect.sign_of_life if self._stream else b" "))

    async def finish(self, body: bytes) -> web.StreamResponse:
        """Send the answer. Raises ConnectionError when the client took none of it within the bound; it is cut off then."""
        if self._begun is None:
            whole = web.Response(body=body, headers=self._headers)
            await self._bounded(whole.prepare(self._request))
            await self._bounded(whole.write_eof())
            return whole
        await self._bounded(self._begun.write(body))
        await self._bounded(self._begun.write_eof())
        return self._begun

    async def refuse(self, refusal: Refusal) -> web.StreamResponse:
        """Tell an error after the status was said: in the stream, or by cutting the answer off, whose repeat is told."""
        if self._stream:
            return await self.finish(self._dialect.stream_error(refusal))
        self._cut()
        raise ConnectionResetError("the answer could not be given after it was begun")

    async def _bounded(self, sending: Awaitable[object]) -> None:
        try:
            async with asyncio.timeout(self._limits.write_s):
                await sending
        except TimeoutError:
            self._cut()
            raise ConnectionResetError("the client did not take its answer") from None

    def _cut(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()


def refused(dialect: Dialect, refusal: Refusal, headers: Mapping[str, str]) -> web.Response:
    """Returns the answer that tells `refusal` in the words of `dialect`; no client repeats the request."""
    told = {**FIXED, **headers, "Content-Type": _JSON, "x-should-retry": "false"}
    return web.Response(body=dialect.error(refusal), status=refusal.status, headers=told)
