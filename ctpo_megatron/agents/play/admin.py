"""Where attempts of agents from elsewhere are opened and closed, by whoever has the run's key.

POST /attempts                {"messages": [...], "answer": "..."}     -> 201, its name, addresses and key
POST /attempts/NAME/close     {"reward": 1.0}, {"text": "..."}, {}     -> 200, what it came to; again: the same
GET  /attempts                                                        -> 200, the open ones, and their seconds
"""

from __future__ import annotations

import hmac
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from aiohttp import web

from ctpo_megatron.agents.http.server import AgentServer
from ctpo_megatron.agents.play.attempts import Closed, NoAnswer, NoSuchAttempt, OpenAttempts, TooMany, prompt_of
from ctpo_megatron.errors import InputError, RolloutError, StorageError, reason

MAX_BODY_BYTES = 1 << 20
STOP_S = 5.0  # for requests that are under way to end
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Admin:
    """Answers requests about `attempts`. `key`: the run's; `model`: what it is called towards agents."""

    def __init__(self, attempts: OpenAttempts, server: AgentServer, *, key: str, model: str, timeout_s: float) -> None:
        self._attempts, self._server = attempts, server
        self._key, self._model, self._timeout_s = key, model, timeout_s

    @asynccontextmanager
    async def serving(self, host: str, port: int) -> AsyncIterator[str]:
        """Yield the address of what serves at `host` and `port` (0: a free one). Raises InputError where it cannot listen."""
        application = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guarded])
        application.router.add_post("/attempts", self._begin)
        application.router.add_get("/attempts", self._list)
        application.router.add_post("/attempts/{name}/close", self._close)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=STOP_S)
        await runner.setup()
        try:
            await _listen(runner, host, port)
            yield f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let through who has the key, and say in JSON what went wrong."""
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._key.encode()):
            return _refusal(401, "this needs the run's key (RUN_DIR/agents.key), sent as `Authorization: Bearer KEY`")
        try:
            return await handler(request)
        except NoSuchAttempt as error:
            return _refusal(404, str(error))
        except NoAnswer as error:
            return _refusal(409, str(error))
        except TooMany as error:
            return _refusal(429, str(error))
        except ValueError as error:
            return _refusal(400, str(error))
        except StorageError as error:
            return _refusal(507, reason(error))
        except RolloutError as error:
            return _refusal(503, f"no verdict, so the attempt is open still; close it again, or with a `reward`: {reason(error)}")
        except web.HTTPException as error:
            return _refusal(error.status, error.reason)

    async def _begin(self, request: web.Request) -> web.Response:
        messages, answer = prompt_of(await _body(request))
        told = self._attempts.begin(messages, answer)
        made = {
            "attempt": str(told.id),
            "openai_url": self._server.openai_url(told.key),
            "anthropic_url": self._server.anthropic_url(told.key),
            "api_key": told.key,
            "model": self._model,
            "timeout_s": self._timeout_s,
        }
        return web.json_response(made, status=201)

    async def _list(self, _request: web.Request) -> web.Response:
        return web.json_response({"open": {name: round(left_s, 1) for name, left_s in self._attempts.open.items()}})

    async def _close(self, request: web.Request) -> web.Response:
        body = await _body(request)
        if not isinstance(body, dict) or len(body) > 1 or not set(body) <= {"reward", "text"}:
            raise ValueError('needed: {"reward": number}, {"text": "what is graded"}, or {} to have graded what the model wrote')
        reward, text = body.get("reward"), body.get("text")
        if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward)):
            raise ValueError("`reward` is a finite number")
        if text is not None and not isinstance(text, str):
            raise ValueError("`text` is text")
        name = request.match_info["name"]
        try:
            made = await self._attempts.close(name, reward=None if reward is None else float(reward), text=text)
        except NoSuchAttempt:
            earlier = self._attempts.closed(name)
            if earlier is None:
                raise
            return _told(name, earlier)
        if made is None:
            return _told(name, Closed())
        sampled = sum(turn.role == "assistant" for turn in made.all_turns)
        return _told(name, Closed(made.status.value, made.reward, sampled, len(made.branches)))


def _told(name: str, came_to: Closed) -> web.Response:
    if came_to.status is None:
        return web.json_response({"attempt": name, "status": None, "turns": 0})
    return web.json_response({"attempt": name, **asdict(came_to)})


async def _listen(runner: web.AppRunner, host: str, port: int) -> None:
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        words = (error.strerror or str(error)).lower()
        raise InputError(
            f"attempts cannot be opened at {host} port {port}: {words}. Choose others in rollout.agent; port 0 is any free one"
        ) from None


async def _body(request: web.Request) -> Any:
    text = await request.text()
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is no JSON: {error}") from None


def _refusal(status: int, words: str) -> web.Response:
    return web.json_response({"error": words}, status=status)
