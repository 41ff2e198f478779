"""Sessions of OpenEnv's servers, by a stand-in that answers as openenv 0.10 was seen to: tests/published plays the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from ctpo_megatron.config.environments import OpenEnvEnvironment
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.worlds.openenv import OpenEnvWorld
from ctpo_megatron.types import Parsed, Prompt

PROMPT = Prompt(0, ({"role": "user", "content": "q"},), "")


class Server:
    """One session at a time, which is done after two steps."""

    def __init__(self) -> None:
        self.open, self.refused, self.heard = 0, 0, []

    async def play(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        if self.open:
            self.refused += 1
            await socket.send_json({"type": "error", "data": {"message": "full", "code": "CAPACITY_REACHED"}})
            await socket.close()
            return socket
        self.open += 1
        steps = 0
        async for message in socket:
            asked = message.json()
            self.heard.append(asked)
            if asked["type"] == "close":
                break
            if "break" in asked["data"].values():
                await socket.send_json({"type": "error", "data": {"message": "no", "code": "EXECUTION_ERROR"}})
                continue
            steps += asked["type"] == "step"
            data = {"observation": {"text": f"seen {steps}", "n": steps}, "reward": 0.5 if steps else None, "done": steps == 2}
            await socket.send_json({"type": "observation", "data": data})
        self.open -= 1
        return socket


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Server, str]]:
    server, app = Server(), web.Application()
    app.router.add_get("/ws", server.play)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield server, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def config(url: str, **options: Any) -> OpenEnvEnvironment:
    return OpenEnvEnvironment(url=url, **{"observation_key": "text", **options})


def test_an_episode() -> None:
    async def check() -> None:
        async with served() as (server, url):
            world = OpenEnvWorld(config(url, action={"kind": "say"}, reset={"seed": 3}))
            assert await world.reset(PROMPT) == "seen 0"
            first, last = await world.step(Parsed("a", "I think")), await world.step(Parsed("b"))
            assert (first.text, first.reward, first.done, last.done) == ("seen 1", 0.5, False, True)
            await world.close()
            assert server.heard == [
                {"type": "reset", "data": {"seed": 3}},
                {"type": "step", "data": {"kind": "say", "message": "a"}},
                {"type": "step", "data": {"kind": "say", "message": "b"}},
                {"type": "close"},
            ]

    asyncio.run(check())


def test_a_session_is_waited_for_and_only_so_long() -> None:
    async def check() -> None:
        async with served() as (server, url):
            first, second = OpenEnvWorld(config(url)), OpenEnvWorld(config(url))
            await first.reset(PROMPT)
            waiting = asyncio.create_task(second.reset(PROMPT))
            while not server.refused:
                await asyncio.sleep(0)
            await first.close()
            assert await waiting == "seen 0"
            late = OpenEnvWorld(config(url, session_wait_s=0.01))
            with pytest.raises(RolloutError, match=r"no free session for 0\.01 s"):
                await late.reset(PROMPT)
            await late.close()
            await second.close()

    asyncio.run(check())


def test_what_a_server_says_of_an_error_is_told() -> None:
    async def check() -> None:
        async with served() as (_, url):
            world = OpenEnvWorld(config(url, observation_key=None))
            assert await world.reset(PROMPT) == '{"text": "seen 0", "n": 0}'
            with pytest.raises(RolloutError, match="EXECUTION_ERROR: no"):
                await world.step(Parsed("break"))
            await world.close()
            odd = OpenEnvWorld(config(url, observation_key="txt"))
            with pytest.raises(RolloutError, match="it has text"):
                await odd.reset(PROMPT)
            await odd.close()
        gone = OpenEnvWorld(config(url))
        with pytest.raises(RolloutError, match="cannot be reached"):
            await gone.reset(PROMPT)
        await gone.close()

    asyncio.run(check())
