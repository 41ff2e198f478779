"""The clients of tools/bench_agents.py: agents that play episodes as OpenAI's client would, and others that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

RETRIES = 2
BACKOFF_S = 0.5
SPREAD = 0.5  # of a turn, over which episodes begin
PLACE = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be played: an episode for each of `keys`. `rude`: misbehave instead, with the first, until stdin ends."""

    keys: list[str]
    port: int
    turn_s: float
    system_characters: int
    rude: bool

    def told(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return asdict(self)


def play_all() -> None:
    """Read an order from stdin, wait for the word, play, and write what came of it to stdout."""
    order = Order(**json.loads(sys.stdin.readline()))
    print("ready", flush=True)
    sys.stdin.readline()
    if order.rude:
        asyncio.run(_rude(order))
    else:
        print(json.dumps(asyncio.run(_play_all(order))), flush=True)


async def _play_all(order: Order) -> dict[str, Any]:
    later: list[float] = []
    url = f"http://127.0.0.1:{order.port}"
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        played = [_episode(session, order, number, later) for number in range(len(order.keys))]
        done = await asyncio.gather(*played, return_exceptions=True)
    failed = [each for each in done if isinstance(each, BaseException)]
    for each in failed[:3]:
        print(f"an episode failed: {each!r}", file=sys.stderr)
    return {"failed": len(failed), "later_ms": parts([1000 * each for each in later])}


def parts(values: list[float]) -> dict[str, float]:
    """Returns the median, the 99th percentile and the largest of `values`; nothing of none."""
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    ranked = sorted(values)
    return {name: ranked[min(int(share * len(ranked)), len(ranked) - 1)] for name, share in shares.items()} if ranked else {}


async def _episode(session: aiohttp.ClientSession, order: Order, number: int, later: list[float]) -> None:
    """Two turns, a tool between them; every other episode asks for streams."""
    await asyncio.sleep(SPREAD * order.turn_s * number / len(order.keys))
    history: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief. " * (order.system_characters // 10)},
        {"role": "user", "content": f"What is {number} times 7?"},
    ]
    tool = {"name": "python", "description": "runs code", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": tool}]
    for turn in range(2):
        body = {"model": "m", "messages": history, "tools": tools, "temperature": 1.0, "stream": bool(number % 2)}
        begun = time.perf_counter()
        message, repeats = await _asked(session, order.keys[number], body)
        if not repeats:
            later.append(time.perf_counter() - begun - order.turn_s)
        if bool(message.get("tool_calls")) != (turn == 0):
            raise ValueError(f"turn {turn} is {message}")
        if turn == 0:
            (call,) = message["tool_calls"]
            history = [*history, message, {"role": "tool", "tool_call_id": call["id"], "content": "42"}]
            await asyncio.sleep(order.turn_s)


async def _asked(session: aiohttp.ClientSession, key: str, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The message, and how often it was asked for again, as OpenAI's client does when a connection breaks."""
    for retry in range(RETRIES + 1):
        headers = {"Authorization": f"Bearer {key}", "x-stainless-retry-count": str(retry)}
        try:
            async with session.post(PLACE, json=body, headers=headers) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise ValueError(f"{answer.status} {text[:200]}")
                return (_assembled(text) if body["stream"] else json.loads(text)["choices"][0]["message"]), retry
        except aiohttp.ClientError:
            if retry == RETRIES:
                raise
            await asyncio.sleep(BACKOFF_S * 2**retry)
    raise AssertionError("the last try returned or raised")


def _assembled(text: str) -> dict[str, Any]:
    """The message of a stream."""
    message: dict[str, Any] = {}
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        delta = json.loads(line[6:])["choices"][0]["delta"]
        for name, value in delta.items():
            message[name] = value if name in ("role", "tool_calls") else message.get(name, "") + value
    return message


async def _rude(order: Order) -> None:
    """Clients that are silent, slow or wrong, until stdin ends."""
    key = order.keys[0]
    auth = {"Authorization": f"Bearer {key}"}
    history = json.dumps({"messages": [{"role": "user", "content": "x" * 1000}] * 7000}).encode()  # within 8 MB, too many
    flat = b'{"messages": [' + b"[]," * 2_000_000 + b"[]]}"  # values without end
    bodies = [
        (b'{"messages": [', auth),
        (b"{}", {"Authorization": "Bearer sk-wrong"}),
        (b"x" * 10_000_000, auth),
        (b"x" * 10_000_000, {"Authorization": "Bearer sk-wrong"}),
        (history, auth),
        (flat, auth),
        (b"[" * 1_000_000, auth),
    ]
    slow = f"POST {PLACE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 9999\r\n\r\n{{".encode()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{order.port}", connector=aiohttp.TCPConnector(limit=0)) as session:
        rude = [_again(session, body, headers) for body, headers in bodies]
        rude += [_held(order.port, begin) for begin in [b""] * 100 + [slow] * 20]
        tasks = [asyncio.ensure_future(each) for each in rude]
        await asyncio.to_thread(sys.stdin.readline)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _again(session: aiohttp.ClientSession, body: bytes, headers: dict[str, str]) -> None:
    """The same wrong request five times a second."""
    while True:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with session.post(PLACE, data=body, headers=headers) as answer:
                await answer.read()
                if answer.status < 400:
                    print("what is wrong was answered", file=sys.stderr)
        await asyncio.sleep(0.2)


async def _held(port: int, begin: bytes) -> None:
    """A connection that says `begin` and then a byte now and then, if anything."""
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(begin)
                while not writer.is_closing():
                    await asyncio.sleep(0.5)
                    writer.write(begin and b"x")
                    await writer.drain()
            finally:
                writer.close()
        await asyncio.sleep(0.5)
