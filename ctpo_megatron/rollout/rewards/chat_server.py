"""Requests to a server that speaks OpenAI's chat completions: which failures are tried again, and which are nobody's answer.

what happened                                                    then
no connection, no answer in time, 408, 409, 425, 429, 500 on     tried again, after a pause
an answer that is no chat completion                             tried again
301 to 308, 401, 403, 404, before anything was answered          ConfigError: url, key or model are wrong
the same later                                                   tried again: somebody is at work on the server
other answers of 400 on                                          Refused: it is this request that cannot be served
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from ctpo_megatron.errors import ConfigError

MAX_BODY_BYTES = 4 << 20
SHOWN = 300  # characters of an answer, in a message
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_MAY_PASS = {408, 409, 425, 429}
_MISTAKES = {301, 302, 303, 307, 308, 401, 403, 404}


class Failed(Exception):
    """A request that brought nothing, and may be sent again, after `pause_s` if the server said so."""

    def __init__(self, why: str, pause_s: float | None = None) -> None:
        super().__init__(why)
        self.pause_s = pause_s


class Refused(Exception):
    """A request that this server does not take, however often it is sent."""


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    total_tokens: int = 0


class Completion(msgspec.Struct):
    """The part of an answer that is used."""

    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None

    @property
    def said(self) -> str:
        """Returns the text of the reply."""
        return self.choices[0].message.content or ""

    @property
    def cut(self) -> bool:
        """Whether its limit of tokens ended it."""
        return self.choices[0].finish_reason == "length"


_DECODER = msgspec.json.Decoder(Completion)


class ChatServer:
    """The server at `url`, asked with `key`; an async context manager."""

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        self._url, self._key, self._timeout_s = f"{url}/chat/completions", key, timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._answered = False

    async def __aenter__(self) -> ChatServer:
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        connector = aiohttp.TCPConnector(limit=0)  # whoever asks bounds how many there are
        self._session = aiohttp.ClientSession(headers=headers, connector=connector)
        return self

    async def __aexit__(self, *_error: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def complete(self, body: dict[str, Any]) -> Completion:
        """Returns the answer to one request, sent once. Raises Failed, Refused and ConfigError, as the module's table says."""
        assert self._session is not None, "it was entered"
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        try:
            # no redirects: they would make a GET of it, or take the answer to another host
            async with self._session.post(self._url, json=body, timeout=timeout, allow_redirects=False) as answer:
                said = await _body(answer)
                if answer.status != 200:
                    self._raise(answer.status, said, answer.headers.get("Retry-After", ""))
        except TimeoutError:
            raise Failed(f"no answer within {self._timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise Failed(f"{type(error).__name__}: {self._shown(str(error))}") from None
        try:
            found = await asyncio.to_thread(_DECODER.decode, said) if len(said) > 1 << 16 else _DECODER.decode(said)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Failed(f"an answer that is no chat completion: {self._shown(said.decode('utf-8', 'replace'))}") from None
        if not found.choices:
            raise Failed("an answer without choices")
        self._answered = True
        return found

    def _raise(self, status: int, body: bytes, retry_after: str) -> None:
        words = f"status {status}: {self._shown(body.decode('utf-8', 'replace'))}"
        if status in _MISTAKES and not self._answered:
            raise ConfigError(f"the judge at {self._url} answers {words}. Look at rollout.reward's url, model and key_file")
        if status in _MISTAKES | _MAY_PASS or not 400 <= status < 500:
            raise Failed(words, float(retry_after) if retry_after.isdigit() else None)
        raise Refused(words)

    def _shown(self, words: str) -> str:
        """Returns the beginning of what a server said, without the key, which some repeat."""
        clean = words if not self._key else words.replace(self._key, "***")
        return " ".join(clean[:SHOWN].split())


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    found = bytearray()
    async for part in answer.content.iter_chunked(1 << 16):
        found += part
        if len(found) > MAX_BODY_BYTES:
            raise Failed(f"an answer of more than {MAX_BODY_BYTES >> 20} MiB")
    return bytes(found)


def pause(number: int, wanted_s: float | None) -> float:
    """Returns how long to wait before the retry `number`, from 1: longer each time, not all at once, or as the server wants."""
    own = FIRST_PAUSE_S * 2 ** (number - 1) * random.uniform(0.5, 1.0)
    return min(own if wanted_s is None else max(wanted_s, own), LONGEST_PAUSE_S)


def read_key(path: str | None) -> str | None:
    """Returns the key in a file; None for no file. Raises ConfigError, which does not show what the file holds."""
    if path is None:
        return None
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rollout.reward.key_file={path} cannot be read: {type(error).__name__}") from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"rollout.reward.key_file={path}: needed is a file with one key in it, and nothing else")
    return key
