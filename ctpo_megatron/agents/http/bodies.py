"""The body of a request: read within bounds, decoded, and named by a digest."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from ctpo_megatron.agents.http.limits import Limits
from ctpo_megatron.agents.http.refusals import Refusal
from ctpo_megatron.engine.http import LARGE_CHARACTERS

UNCOUNTED = ("stream", "stream_options")  # how the answer is brought does not make it another request


@dataclass(frozen=True, slots=True)
class Body:
    """What a client asks for. `digest`: 32 hexadecimal digits, the same for the same values in any order of keys and spacing."""

    values: dict[str, Any]
    digest: str


async def read_body(request: web.BaseRequest, limits: Limits, large: asyncio.Lock) -> Body:
    """Returns the decoded body of `request`. Raises Refusal when it is too large, too slow, or no JSON object.

    `large`: held while a large body is decoded. Decoding holds the interpreter, and the event loop has to wait for it anew at
    each of its system calls: beside one thread that is bearable, beside several it is not.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refusal("a body has to be sent as it is, without Content-Encoding")
    if (request.content_length or 0) > limits.body_bytes:
        raise _too_large(limits)
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    raw = await _read(request, limits)
    if len(raw) < LARGE_CHARACTERS:
        return decoded(raw, limits)
    async with large:
        return await asyncio.to_thread(decoded, raw, limits)


async def _read(request: web.BaseRequest, limits: Limits) -> bytes:
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for part in request.content.iter_any():
                size += len(part)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                parts.append(part)
    except TimeoutError:
        raise Refusal(f"the body of the request did not arrive within {limits.body_s:g} s") from None
    return b"".join(parts)


def _too_large(limits: Limits) -> Refusal:
    return Refusal(
        f"the body of a request has at most {limits.body_bytes:,} bytes; shorten the history", status=413, code="body_too_large"
    )


def decoded(raw: bytes, limits: Limits) -> Body:
    """Returns what the JSON text `raw` says. Raises Refusal."""
    if raw.count(b"[") + raw.count(b"{") > limits.brackets or raw.count(b",") > limits.commas:
        raise Refusal(
            f"the body of a request has at most {limits.brackets:,} opening brackets and {limits.commas:,} commas; shorten the "
            "history",
            status=413,
            code="body_too_large",
        )
    try:
        values = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"the body is not JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise _too_deep(limits) from None
    if not isinstance(values, dict):
        raise Refusal(f"the body is a JSON object, not {type(values).__name__}", code="invalid_json")
    if _deeper(values, limits.nesting):
        raise _too_deep(limits)
    messages = values.get("messages")
    if isinstance(messages, list) and len(messages) > limits.messages:
        raise Refusal(f"messages has {len(messages):,} messages; a history has at most {limits.messages:,}")
    counted = {name: value for name, value in values.items() if name not in UNCOUNTED}
    text = msgspec.json.encode(counted, order="deterministic")
    return Body(values, hashlib.blake2b(text, digest_size=16).hexdigest())


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects lie in each other more than `most` deep."""
    level = [value]
    for _ in range(most):
        level = [
            each
            for outer in level
            for each in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(each, dict | list)
        ]
        if not level:
            return False
    return True


def _too_deep(limits: Limits) -> Refusal:
    return Refusal(f"lists and objects of a body are nested at most {limits.nesting} deep", code="invalid_json")
