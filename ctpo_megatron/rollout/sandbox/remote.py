"""The Python tool over HTTP: programs go to a sandbox on another host (`service`), where each is confined.

    what happened                               what follows
    no connection, or one that broke            sent again, after a pause that doubles
    no answer in time                           sent again
    500 or above (503: no place is free), or
    an answer that makes no sense               sent again
    410, of a notebook that is not there        sent again with the programs that were run in it
    300 to 499 otherwise                        RolloutError at once: no repeat mends it

A program that is sent again may have been run before. That does no harm: nothing that it does outlives it, and a notebook knows
its programs by number and runs none twice. What is still unanswered after all retries is a RolloutError: a failure of the
attempt, never an output that the model would read.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated, TypeVar

import aiohttp
import msgspec

from ctpo_megatron.config.tools import RemoteTool
from ctpo_megatron.errors import ConfigError, RolloutError
from ctpo_megatron.rollout.output import clip_middle
from ctpo_megatron.rollout.protocols import PastCall, ToolResult
from ctpo_megatron.rollout.sandbox.beside import beside
from ctpo_megatron.rollout.sandbox.escape import CASES
from ctpo_megatron.rollout.sandbox.key import header, read_key

RUN, STATUS, NOTEBOOKS = "/run", "/status", "/notebooks"  # what the service answers
CLOSING_S = 2.0  # to tell it that a notebook is not needed any more
WAITING_S = 30.0  # longest time that a program waits for a place there, besides its own
PATIENCE_S = 30.0  # with a sandbox that comes up while a run does
PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
_GONE = 410
MAX_ANSWER_BYTES = 1 << 22
SHOWN_CHARACTERS = 300  # of an answer, in a message


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a program belongs: to a notebook, by the name that its client drew, as program `number` (from 1 on).

    `past`: what was run in it before, of a notebook that may have to be made.
    """

    notebook: Annotated[str, msgspec.Meta(min_length=16, max_length=64)]
    number: Annotated[int, msgspec.Meta(ge=1)]
    past: list[PastCall] | None = None


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request to run a program; `cell`: in a notebook."""

    code: str
    timeout_s: float
    memory_mb: int
    max_output_chars: int
    cell: Cell | None = None


class Said(msgspec.Struct, frozen=True):
    """The answer to it: what `ToolResult` holds."""

    output: str
    ok: bool
    seconds: float


class Status(msgspec.Struct, frozen=True):
    """What the service says of itself: the most that a program may ask for, and which escapes were attempted and refused."""

    timeout_s: float
    memory_mb: int
    refused: list[str]


T = TypeVar("T", Said, Status)


class _Unanswered(Exception):
    """No usable answer came; another try may bring one."""


class _Refused(Exception):
    """The service understood and refused."""


class _Forgotten(Exception):
    """The service does not know the notebook."""


class RemotePython:
    """The tool. Each attempt has a connection of its own, closed with it; at most `config.concurrency` programs are under way."""

    def __init__(self, config: RemoteTool) -> None:
        self._config = config
        self._key = read_key(config.key_file, "rollout.tool.key_file")
        self._slots = asyncio.Semaphore(config.concurrency)

    @asynccontextmanager
    async def session(self, past: Sequence[PastCall] = ()) -> AsyncIterator[RemoteSession]:
        """The tool over one connection, which is made when it is needed. `past` matters to a notebook alone."""
        async with _connected(self._key) as http:
            session = RemoteSession(self._config, self._slots, http, past)
            try:
                yield session
            finally:
                await session.close()

    async def run(self, code: str) -> ToolResult:
        """What `code` said, over a connection for this call. Raises RolloutError: see the module."""
        async with self.session() as session:
            return await session.run(code)


class RemoteSession:
    """The connection of one attempt, and its notebook."""

    def __init__(
        self, config: RemoteTool, slots: asyncio.Semaphore, http: aiohttp.ClientSession, past: Sequence[PastCall] = ()
    ) -> None:
        self._config = config
        self._slots = slots
        self._http = http
        self._past = list(past)
        self._notebook = secrets.token_hex(16)
        self._there = False  # whether the service has the notebook, as far as is known

    async def run(self, code: str) -> ToolResult:
        """What `code` said. Raises RolloutError: see the module."""
        async with self._slots:
            begun = time.monotonic()
            try:
                said = await self._patiently(self._program(code))
            except _Forgotten:
                self._there = False
                said = await self._patiently(self._program(code))
        output = clip_middle(said.output, self._config.max_output_chars)
        self._there = self._config.notebook
        self._past.append(PastCall(code, output))
        return ToolResult(output, said.ok, time.monotonic() - begun)

    async def close(self) -> None:
        """Let the service end the notebook at once; one that is not told ends it after some time."""
        if self._there:
            url = f"{self._config.url}{NOTEBOOKS}/{self._notebook}"
            with suppress(aiohttp.ClientError, TimeoutError):
                await self._http.delete(url, timeout=aiohttp.ClientTimeout(total=CLOSING_S), allow_redirects=False)

    def _program(self, code: str) -> Program:
        config, cell = self._config, None
        if config.notebook:
            cell = Cell(self._notebook, len(self._past) + 1, None if self._there else self._past)
        return Program(code, config.timeout_s, config.memory_mb, config.max_output_chars, cell)

    async def _patiently(self, program: Program) -> Said:
        for number in range(self._config.retries + 1):
            if number:
                await asyncio.sleep(min(PAUSE_S * 2 ** (number - 1), LONGEST_PAUSE_S))
            try:
                return await _post(self._http, self._config.url, program)
            except _Forgotten:
                if program.cell is not None and program.cell.past is None:
                    raise
                newest = _Unanswered("it forgets notebooks")
            except _Refused as refused:
                raise RolloutError(f"the sandbox at {self._config.url} refused a program: {refused}") from refused
            except _Unanswered as error:
                newest = error
        raise RolloutError(f"the sandbox at {self._config.url} gave no answer in {self._config.retries + 1} tries: {newest}")


def require_service(config: RemoteTool) -> None:
    """Return where the sandbox answers, knows the key, and gives what `config` asks for. Raises ConfigError.

    It has made the escape test itself, at its start, and says so. One that does not answer yet is waited for, `PATIENCE_S`.
    """
    key = read_key(config.key_file, "rollout.tool.key_file")
    try:
        status, said = beside(_tried(config, key))
    except (_Unanswered, _Refused) as error:
        raise ConfigError(
            f"rollout.tool: the sandbox at {config.url} cannot be used: {error}. `ctpo serve-sandbox --key-file FILE` starts one."
        ) from error
    for name, wanted, most in (
        ("timeout_s", config.timeout_s, status.timeout_s),
        ("memory_mb", config.memory_mb, status.memory_mb),
    ):
        if wanted > most:
            raise ConfigError(f"rollout.tool.{name}={wanted:g}: the sandbox at {config.url} gives at most {most:g}")
    if untried := [case for case in CASES if case not in status.refused]:
        raise ConfigError(f"rollout.tool: the sandbox at {config.url} was not tried against {', '.join(untried)}")
    if said is None or (said.ok, said.output) != (True, "42"):
        raise ConfigError(f"rollout.tool: the sandbox at {config.url} said {said!r} to `print(6 * 7)`")


async def _tried(config: RemoteTool, key: str) -> tuple[Status, Said | None]:
    async with _connected(key) as http:
        status = await _status(http, config.url)
        if config.timeout_s > status.timeout_s or config.memory_mb > status.memory_mb:
            return status, None
        return status, await _post(http, config.url, Program("print(6 * 7)", config.timeout_s, config.memory_mb, 100))


async def _status(http: aiohttp.ClientSession, url: str) -> Status:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await _ask(http, "GET", f"{url}{STATUS}", None, max(1.0, end - time.monotonic()), Status)
        except _Unanswered:
            if time.monotonic() > end:
                raise
        await asyncio.sleep(PAUSE_S)


def _connected(key: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers=header(key), connector=aiohttp.TCPConnector(limit=1), cookie_jar=aiohttp.DummyCookieJar()
    )


async def _post(http: aiohttp.ClientSession, url: str, program: Program) -> Said:
    return await _ask(http, "POST", f"{url}{RUN}", msgspec.json.encode(program), program.timeout_s + WAITING_S, Said)


async def _ask(http: aiohttp.ClientSession, method: str, url: str, body: bytes | None, timeout_s: float, kind: type[T]) -> T:
    """The answer to one request. No redirection is followed, since the key would go with it."""
    limit = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with http.request(method, url, data=body, timeout=limit, allow_redirects=False) as answer:
            content = b""
            async for part in answer.content.iter_chunked(1 << 16):
                content += part
                if len(content) > MAX_ANSWER_BYTES:
                    raise _Unanswered(f"more than {MAX_ANSWER_BYTES} bytes")
    except TimeoutError:
        raise _Unanswered(f"nothing within {timeout_s:g} s") from None
    except aiohttp.ClientError as error:
        raise _Unanswered(f"{type(error).__name__}: {error}") from error
    shown = content.decode("utf-8", "replace")[:SHOWN_CHARACTERS]
    if answer.status >= 500:
        raise _Unanswered(f"{answer.status}: {shown}")
    if answer.status == _GONE:
        raise _Forgotten
    if answer.status >= 300:
        raise _Refused(f"{answer.status}: {shown}")
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.MsgspecError as error:
        raise _Unanswered(f"{answer.status}, but {error}: {shown}") from error
