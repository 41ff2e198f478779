"""Requests to inference servers: the one place that says what counts as a failure, and which failures are tried again.

    failure        what happened                             tried again    the server counts as
    unreachable    the connection failed or broke            yes            gone
    silent         no answer within the bound                no             gone
    broken         an answer of 500 or above, or no JSON     yes            at fault
    refused        an answer of 400 to 499                   no             at fault; raised as EngineRefused

Only what may be done twice is tried again: generations and the driver's control of a server (`Requests`). What the senders of
weights ask for is asked once (`engine.calls`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import msgspec

from ctpo_megatron.errors import EngineError, EngineRefused

RETRIES = 5
BACKOFF_S = 0.2
SHOWN_CHARACTERS = 500  # of an answer, in a message
LARGE_CHARACTERS = 2**18  # of an answer; decoding fewer takes a millisecond, not much longer than changing threads

Method = Literal["GET", "POST"]
Body = dict[str, Any] | Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request brought no usable answer; the table above lists the kinds."""

    kind: Literal["unreachable", "silent", "broken", "refused"]
    message: str

    @property
    def gone(self) -> bool:
        """Returns whether the server gave no answer at all."""
        return self.kind in ("unreachable", "silent")

    @property
    def may_pass(self) -> bool:
        """Returns whether another try may succeed."""
        return self.kind in ("unreachable", "broken")

    @property
    def error(self) -> EngineError:
        """Returns the exception for callers that need the answer."""
        return EngineRefused(self.message) if self.kind == "refused" else EngineError(self.message)


@dataclass(frozen=True, slots=True)
class Answer:
    """A usable answer: the decoded JSON, or the text of an answer of another type."""

    value: Any


def open_session(api_key: str, *, reuse: bool) -> aiohttp.ClientSession:
    """Returns connections that carry a key, none if it is empty, as many as the caller asks for. Call it inside the event loop.

    `reuse`: a connection serves one request after the other. A server may close an idle one in the moment of the next request,
    which then fails: where nothing is tried again each request needs a connection of its own.
    """
    connector = aiohttp.TCPConnector(limit=0, force_close=not reuse)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(headers=headers, connector=connector, json_serialize=_json)


def _json(body: Any) -> str:
    """Returns JSON of plain data, of thousands of token ids in a tenth of the time that Python's own encoder takes."""
    return msgspec.json.encode(body).decode()


async def ask(
    session: aiohttp.ClientSession, method: Method, url: str, body: dict[str, Any] | None, timeout_s: float
) -> Answer | Failure:
    """Returns the answer to one request, asked once and given up after `timeout_s`."""
    try:
        async with session.request(method, url, json=body, timeout=aiohttp.ClientTimeout(total=timeout_s)) as answer:
            text = await answer.text(errors="replace")
            if answer.status < 400:
                if answer.content_type != "application/json":
                    return Answer(text)
                try:
                    return Answer(await beside_loop(len(text), msgspec.json.decode, text))
                except msgspec.DecodeError as error:
                    return Failure("broken", f"{url} answered {answer.status} with damaged JSON: {error}")
            kind: Literal["broken", "refused"] = "broken" if answer.status >= 500 else "refused"
            return Failure(kind, f"{url} answered {answer.status}: {text[:SHOWN_CHARACTERS]}")
    except TimeoutError:
        return Failure("silent", f"{url} did not answer within {timeout_s:.0f} s")
    except aiohttp.ClientError as error:
        return Failure("unreachable", f"{url} {type(error).__name__}: {error}")


async def beside_loop(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns: of a large input, `size` characters, in a thread, so that other answers are read meanwhile."""
    return function(*arguments) if size < LARGE_CHARACTERS else await asyncio.to_thread(function, *arguments)


class Requests:
    """Requests with the run's key, each bounded by `timeout_s` and tried up to RETRIES times; an async context manager."""

    def __init__(self, api_key: str, timeout_s: float) -> None:
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Requests:
        self._session = open_session(self._api_key, reuse=True)
        return self

    async def __aexit__(self, *_error: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, url: str, *, timeout_s: float | None = None) -> Any:
        """Returns the decoded answer. Raises EngineError, or EngineRefused, as the module's table says."""
        return await self.request("GET", url, None, timeout_s or self._timeout_s)

    async def post(self, url: str, body: Body, *, timeout_s: float | None = None) -> Any:
        """Returns the decoded answer. Raises EngineError, or EngineRefused, as the module's table says.

        `body` may be a function that makes the body of each try: a server refuses a name of a request that it still knows.
        """
        return await self.request("POST", url, body, timeout_s or self._timeout_s)

    async def request(self, method: Method, url: str, body: Body | None, timeout_s: float) -> Any:
        """Returns the decoded answer, as `get` and `post` do."""
        if self._session is None:
            raise EngineError(f"{url} cannot be asked: Requests is used as an async context manager, and was not entered")
        answer = await ask(self._session, method, url, _made(body), timeout_s)
        for attempt in range(RETRIES - 1):
            if isinstance(answer, Answer) or not answer.may_pass:
                break
            await asyncio.sleep(BACKOFF_S * 2**attempt)
            answer = await ask(self._session, method, url, _made(body), timeout_s)
        if isinstance(answer, Failure):
            raise answer.error
        return answer.value


def _made(body: Body | None) -> dict[str, Any] | None:
    return body() if callable(body) else body
