"""Environment servers of OpenEnv 0.10 as worlds, over their websocket.

What holds for those servers: HTTP's /reset and /step keep no state between two requests, so an episode is one websocket; a server
has one session unless it was told another number, and answers CAPACITY_REACHED to the next; a step after `done` is carried out
and rewarded once more, so none is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

import aiohttp

from ctpo_megatron.config.environments import OpenEnvEnvironment
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.worlds.protocols import StepResult
from ctpo_megatron.types import Parsed, Prompt

PAUSE_S = 0.1  # between two tries to get a session
MAX_MESSAGE = 16 << 20  # bytes


class OpenEnvWorld:
    """One session of a server. What the model writes, less its reasoning, is the action."""

    tools: Sequence[dict[str, Any]] = ()
    replayable = False

    def __init__(self, config: OpenEnvEnvironment) -> None:
        self._config = config
        self._http: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def reset(self, prompt: Prompt) -> str | None:
        """Open a session; returns the first observation. Raises RolloutError where the server gives none in time."""
        self._http = aiohttp.ClientSession()
        try:
            async with asyncio.timeout(self._config.session_wait_s):
                while (answer := await self._open(self._http)) is None:
                    await asyncio.sleep(PAUSE_S)
        except TimeoutError as error:
            raise RolloutError(
                f"{self._config.url} had no free session for {self._config.session_wait_s:g} s. Start it with a larger "
                "max_concurrent_envs, or set rollout.concurrency to the number that it has"
            ) from error
        return self._shown(answer)

    async def step(self, turn: Parsed) -> StepResult:
        """The observation after an action."""
        answer = await self._ask("step", {**self._config.action, self._config.action_key: turn.content})
        return StepResult(self._shown(answer), reward=answer.get("reward"), done=bool(answer.get("done")))

    async def close(self) -> None:
        """End the session."""
        try:
            if self._socket is not None and not self._socket.closed:
                await self._socket.send_json({"type": "close"})
                await self._socket.close()
        except (aiohttp.ClientError, ConnectionError):
            pass  # the session ends with the connection, which is gone already
        finally:
            if self._http is not None:
                await self._http.close()

    async def _open(self, http: aiohttp.ClientSession) -> dict[str, Any] | None:
        """The first observation of a new session; None where all are taken."""
        url = f"ws{self._config.url.rstrip('/').removeprefix('http').removeprefix('ws')}/ws"
        try:
            self._socket = await http.ws_connect(url, max_msg_size=MAX_MESSAGE)
            return await self._ask("reset", self._config.reset)
        except _CapacityReached:
            return None
        except aiohttp.ClientError as error:
            raise RolloutError(f"{url} cannot be reached: {error}. Is the environment's server running?") from error

    async def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        assert self._socket is not None, "reset opens it"
        with contextlib.suppress(ConnectionError):  # what the server said before it closed is still to be read
            await self._socket.send_json({"type": kind, "data": data})
        message = await self._socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise RolloutError(f"{self._config.url} closed the session instead of answering to {kind!r}")
        answer = json.loads(message.data)
        if answer.get("type") == "error":
            said = answer.get("data", {})
            if said.get("code") == "CAPACITY_REACHED":
                await self._socket.close()
                raise _CapacityReached
            raise RolloutError(f"{self._config.url} answered to {kind!r}: {said.get('code')}: {said.get('message')}")
        return answer["data"]

    def _shown(self, answer: dict[str, Any]) -> str:
        observation, key = answer["observation"], self._config.observation_key
        if key is None:
            return json.dumps(observation, ensure_ascii=False)
        if key not in observation:
            raise RolloutError(
                f"rollout.environment.observation_key={key}: the observation has no such field; it has {', '.join(observation)}"
            )
        value = observation[key]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class _CapacityReached(Exception):
    """All sessions of the server are taken."""
