"""The confined Python over HTTP, for runs on other hosts. Whoever knows the key may run programs here, confined as everywhere.

GET    /status                                                     -> {"timeout_s", "memory_mb", "refused"}
POST   /run {"code", "timeout_s", "memory_mb", "max_output_chars"} -> {"output", "ok", "seconds"}
       in a notebook: besides {"cell": {"notebook", "number", "past"}}
DELETE /notebooks/NOTEBOOK

400 a body that cannot be used, or asks for more than there is      401 no key, or a wrong one
408 a body that came too slowly     410 a notebook that is not here     413 a body that is too large
500 bubblewrap failed               503 too many programs wait, or too many notebooks are open
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from aiohttp import web

from ctpo_megatron.config.tools import PythonTool
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.protocols import ToolResult
from ctpo_megatron.rollout.sandbox.escape import CASES
from ctpo_megatron.rollout.sandbox.key import fits
from ctpo_megatron.rollout.sandbox.python import BubblewrapPython
from ctpo_megatron.rollout.sandbox.remote import NOTEBOOKS, RUN, STATUS, Program, Said, Status
from ctpo_megatron.rollout.sandbox.shelf import NoRoomForNotebook, Shelf, UnknownNotebook

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 30.0
LONGEST_QUEUE = 4096  # programs that wait for a place
ENDING_S = 1.0  # for answers that are being sent when it is told to end
MAX_OUTPUT_CHARS = 1 << 20

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Most:
    """What the service gives at most."""

    timeout_s: float
    memory_mb: int
    at_a_time: int


class Service:
    """Answers the requests above. Make it inside the event loop that serves it."""

    def __init__(self, most: Most, key: str) -> None:
        self._most = most
        self._key = key
        self._slots = asyncio.Semaphore(most.at_a_time)
        self._shelf = Shelf(self._slots)
        self._under_way = 0

    def runner(self) -> web.AppRunner:
        """Returns what a site of aiohttp is made for. A program ends when nobody waits for it any more."""
        application = web.Application(middlewares=[self._checked], client_max_size=MAX_BODY_BYTES)
        application.add_routes([web.get(STATUS, self._status), web.post(RUN, self._run)])
        application.add_routes([web.delete(f"{NOTEBOOKS}/{{notebook}}", self._close)])
        application.on_cleanup.append(self._close_all)
        return web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=ENDING_S, handle_signals=False
        )

    @web.middleware
    async def _checked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whoever has no key learns nothing, not even which paths there are; nothing that he sends is read."""
        if not fits(request.headers.get("Authorization", ""), self._key):
            refused = _error(401, "no key, or a wrong one")
            refused.force_close()
            return refused
        return await handler(request)

    async def _status(self, _request: web.Request) -> web.Response:
        return _json(Status(self._most.timeout_s, self._most.memory_mb, list(CASES)))

    async def _run(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await request.read()
            program = msgspec.json.decode(body, type=Program)
        except TimeoutError:
            return _error(408, f"the body did not come within {BODY_TIMEOUT_S:g} s")
        except msgspec.MsgspecError as error:
            return _error(400, f"the body is no program: {error}")
        wrong = self._wrong(program)
        if wrong is not None:
            return _error(400, wrong)
        if self._under_way >= self._most.at_a_time + LONGEST_QUEUE:
            return _error(503, f"{LONGEST_QUEUE} programs wait already")
        config = PythonTool(timeout_s=program.timeout_s, memory_mb=program.memory_mb, max_output_chars=program.max_output_chars)
        self._under_way += 1
        try:
            result = await self._result(program, config)
        except UnknownNotebook:
            return _error(410, "no such notebook here")
        except NoRoomForNotebook:
            return _error(503, "too many notebooks are open")
        except RolloutError as error:
            return _error(500, str(error))
        finally:
            self._under_way -= 1
        return _json(Said(result.output, result.ok, result.seconds))

    async def _result(self, program: Program, config: PythonTool) -> ToolResult:
        if program.cell is not None:
            return await self._shelf.run(program.cell, program.code, config)
        return await BubblewrapPython(config, slots=self._slots).run(program.code)

    async def _close(self, request: web.Request) -> web.Response:
        self._shelf.close(request.match_info["notebook"])
        return web.Response(status=204)

    async def _close_all(self, _application: web.Application) -> None:
        self._shelf.close_all()

    def _wrong(self, program: Program) -> str | None:
        """What a program asks for that it does not get."""
        for name, asked, most in (
            ("timeout_s", program.timeout_s, self._most.timeout_s),
            ("memory_mb", program.memory_mb, self._most.memory_mb),
            ("max_output_chars", program.max_output_chars, MAX_OUTPUT_CHARS),
        ):
            if not 0 < asked <= most:
                return f"{name}={asked:g}; allowed: above 0, at most {most:g}"
        return None


def _json(value: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)
