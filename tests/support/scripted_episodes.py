"""What the tests of the agents' endpoint share: a server with scripted attempts, and sockets that speak HTTP by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from scripted_episode import ScriptedEpisode, scripted_answer

from ctpo_megatron.agents.http.keys import KeyedEpisodes, new_key
from ctpo_megatron.agents.http.server import AgentServer
from ctpo_megatron.agents.protocols import ToolCall

WAIT_S = 30.0  # for what comes at once; only a test that fails waits for so long

WEATHER = ToolCall("call_1", "weather", '{"city":  "Z\\u00fcrich", "days": 1.0}')
HOUR = ToolCall("call_2", "hour", "{}")
WEATHER_TOOL = {"name": "weather", "description": "the weather", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": WEATHER_TOOL | {"strict": True}}]  # without it OpenAI's stream helper takes no tools


def two_turns() -> list[Any]:
    """Returns an episode of two turns: two calls at once, with reasoning, then an answer."""
    return [scripted_answer(None, WEATHER, HOUR, reasoning="I look."), scripted_answer("It rains: ü€😀.", turn=1)]


@dataclass
class Served:
    """A server, and an attempt with its key."""

    server: AgentServer
    episodes: KeyedEpisodes
    episode: ScriptedEpisode
    key: str

    @property
    def openai(self) -> str:
        return self.server.openai_url(self.key)

    @property
    def anthropic(self) -> str:
        return self.server.anthropic_url(self.key)


@asynccontextmanager
async def served(*turns: Any, **options: Any) -> AsyncIterator[Served]:
    """A server on a free port of the loopback; `turns`: of its one attempt, `two_turns` where there are none."""
    episodes, key = KeyedEpisodes(), new_key()
    episode = ScriptedEpisode(turns or two_turns())
    episodes.add(key, episode)
    async with AgentServer(episodes, **options) as server:
        yield Served(server, episodes, episode, key)


@dataclass
class Answered:
    """An answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def head(place: str, length: int, *headers: str) -> bytes:
    """Returns the head of a POST."""
    lines = [f"POST {place} HTTP/1.1", "Host: x", f"Content-Length: {length}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def asked(given: Served, body: bytes | dict[str, Any], place: str = "/v1/chat/completions", *headers: str) -> Answered:
    """The answer to one POST with the attempt's key, unless `headers` has another."""
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    keyed = headers or (f"Authorization: Bearer {given.key}",)
    return await sent(given.server.port, head(place, len(raw), *keyed) + raw)


async def sent(port: int, raw: bytes) -> Answered:
    """The answer to `raw`, bytes as they go over the wire."""
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(raw)
            return await received(reader)
        finally:
            writer.close()


async def received(reader: asyncio.StreamReader) -> Answered:
    """One answer, of a stated length or in chunks."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:] if line)}
    body = b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
    else:
        body = await reader.readexactly(int(headers["content-length"]))
    return Answered(int(lines[0].split()[1]), headers, body)
