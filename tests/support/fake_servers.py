"""Small HTTP servers that speak the few words of SGLang's that the driver uses, and misbehave on request.

Only the driver's own logic is under test with them; tests/integration has the real ones.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
from aiohttp import web

from ctpo_megatron.config.traffic import TrafficConfig
from ctpo_megatron.engine.answers import Experts
from ctpo_megatron.engine.checksums import write_digest
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.weights.protocol import Sent, Server

STOP = 9


class FakeServer:
    """Answers each generation with `tokens` of the current version; `digests` are what its weights are said to be."""

    def __init__(self, tokens: int = 4) -> None:
        self.url = ""
        self.tokens = tokens
        self.version = "0"
        self.digests: dict[str, int] = {}
        self.logprob = -1.0  # of every prompt token
        self.outlier = 0.0  # added to that of the last one
        self.experts: np.ndarray | None = None  # of a prompt's tokens, [tokens, layers, top_k]
        self.calls: list[str] = []
        self.generations: list[dict[str, Any]] = []
        self.running = asyncio.Event()
        self.running.set()
        self.session = False
        self.given_back: set[str] = set()  # kinds of memory
        self.faults: dict[str, Callable[[], web.Response | None]] = {}  # by path: called instead of, or before, the answer
        self.hold: asyncio.Event | None = None  # generations wait for it

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeServer]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self._runner = runner
        try:
            yield self
        finally:
            await runner.cleanup()

    async def die(self) -> None:
        """Its connections break and nobody answers any more."""
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = "/" + request.match_info["path"]
        self.calls.append(path)
        fault = self.faults.get(path)
        if fault is not None and (answer := fault()) is not None:
            return answer
        body = await request.json() if request.can_read_body else {}
        handler = {
            "/pause_generation": self._pause,
            "/continue_generation": self._resume,
            "/begin_weight_update": self._begin,
            "/end_weight_update": self._end,
            "/update_weight_version": self._set_version,
            "/release_memory_occupation": self._sleep,
            "/resume_memory_occupation": self._wake,
            "/model_info": self._info,
            "/v1/loads": self._loads,
            "/weights_checker": self._checksums,
            "/generate": self._generate,
        }.get(path)
        return web.json_response(await handler(body) if handler else {})

    async def _pause(self, _body: dict[str, Any]) -> dict[str, Any]:
        self.running.clear()
        return {}

    async def _resume(self, _body: dict[str, Any]) -> dict[str, Any]:
        self.running.set()
        return {}

    async def _begin(self, _body: dict[str, Any]) -> dict[str, Any]:
        if self.session:
            raise web.HTTPBadRequest(text="a weight-update session is already open")
        self.session = True
        return {}

    async def _end(self, _body: dict[str, Any]) -> dict[str, Any]:
        if not self.session:
            raise web.HTTPBadRequest(text="no weight-update session is open")
        self.session = False
        return {}

    async def _set_version(self, body: dict[str, Any]) -> dict[str, Any]:
        self.version = body["new_version"]
        return {}

    async def _sleep(self, body: dict[str, Any]) -> dict[str, Any]:
        assert not self.running.is_set(), "not paused"
        assert body["tags"], "to SGLang no tags are all tags"
        self.calls[-1] += f" {' '.join(body['tags'])}"
        self.given_back |= set(body["tags"])
        return {}

    async def _wake(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["tags"], "to SGLang no tags are all tags"
        assert self.given_back.issuperset(body["tags"]), "SGLang ends when asked for memory that it has"
        self.calls[-1] += f" {' '.join(body['tags'])}"
        self.given_back -= set(body["tags"])
        return {}

    async def _info(self, _body: dict[str, Any]) -> dict[str, Any]:
        return {"weight_version": self.version}

    async def _loads(self, _body: dict[str, Any]) -> dict[str, Any]:
        return {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0, "token_usage": 0.0}]}

    async def _checksums(self, _body: dict[str, Any]) -> dict[str, Any]:
        sums = {name: write_digest(value) for name, value in self.digests.items()}
        return {"success": True, "ranks": [{"parallelism_info": [{"tp_rank": 0}], "checksums": sums}]}

    async def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        if "logprob_start_len" in body:
            rows = [[None, token, None] for token in body["input_ids"][:1]]
            rows += [[self.logprob, token, None] for token in body["input_ids"][1:]]
            rows[-1][0] += self.outlier
            meta: dict[str, Any] = {"input_token_logprobs": rows}
            if body.get("return_routed_experts") and self.experts is not None:
                meta["routed_experts"] = base64.b64encode(self.experts.astype(np.int32).tobytes()).decode()
            return {"output_ids": [1], "meta_info": meta}
        self.generations.append(body)
        if self.hold is not None:
            await self.hold.wait()
        await self.running.wait()
        count = min(self.tokens, body["sampling_params"]["max_new_tokens"])
        ended = count == body["sampling_params"]["max_new_tokens"]
        meta = {
            "output_token_logprobs": [[-0.5, 1, None]] * count,
            "weight_version": self.version,
            "finish_reason": {"type": "length" if ended else "abort"},
        }
        return {"output_ids": [1] * count, "meta_info": meta}


class FakeTrainer:
    """Gives every connected server the digests of a version; `faults` may change what arrives, or raise."""

    def __init__(self, fakes: list[FakeServer], names: list[str]) -> None:
        self.fakes = fakes
        self.names = names
        self.connections: list[list[str]] = []
        self.asked: list[int] = []  # how much the servers had been asked before each connection
        self.unreachable: list[str] = []  # servers that the next connection fails because of
        self.prepared: list[tuple[int, int]] = []  # versions, and how much the servers had been asked by then
        self.published: list[int] = []
        self.logprob = -1.0
        self.canaries: list[tuple[list[int], Experts | None]] = []  # prompts, and the experts they were to go to
        self.stuck: int | None = None  # a version whose weights it goes on sending
        self.faults: list[Callable[[FakeServer, dict[str, int]], dict[str, int]] | None] = []  # one per publication

    async def connect(self, servers: list[Server], _api_key: str) -> None:
        self.asked.append(sum(len(fake.calls) for fake in self.fakes))
        self.connections.append([server.url for server in servers])
        bad, self.unreachable = self.unreachable, []
        if bad:
            raise WeightSyncError("it did not come into the group", servers=bad)

    async def prepare(self, version: int) -> None:
        self.prepared.append((version, sum(len(fake.calls) for fake in self.fakes)))

    async def publish(self, version: int) -> Sent:
        assert self.prepared[-1][0] == version
        self.published.append(version)
        fault = self.faults.pop(0) if self.faults else None
        held = version if self.stuck is None else self.stuck
        weights = {name: 1000 * held + number for number, name in enumerate(self.names)}
        for fake in self.fakes:
            if fake.url in self.connections[-1]:
                fake.digests = dict(weights) if fault is None else fault(fake, dict(weights))
        return Sent(version, len(weights), 8, [weights], {"gather": 0.1, "send": 0.2})

    async def canary_logp(self, token_ids: list[int], experts: Experts | None = None) -> list[float]:
        self.canaries.append((token_ids, experts))
        return [self.logprob] * (len(token_ids) - 1)


def blaming(*urls: str) -> Callable[[FakeServer, dict[str, int]], dict[str, int]]:
    """A transport that fails because of these servers."""

    def fault(_fake: FakeServer, _weights: dict[str, int]) -> dict[str, int]:
        raise WeightSyncError("the broadcast broke", servers=urls)

    return fault


@asynccontextmanager
async def fakes(
    count: int,
    *,
    servers: list[FakeServer] | None = None,
    traffic: TrafficConfig | None = None,
    most: int = 1,
    **options: Any,
) -> AsyncIterator[tuple[list[FakeServer], Fleet, EngineClient, list[str]]]:
    """That many servers, or these, that have joined a fleet, a client of it, and a sentence for each event."""
    said: list[str] = []
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(each.serving()) for each in servers or [FakeServer() for _ in range(count)]]
        fleet = Fleet(**{"patience_s": 5.0, "emit": lambda event: said.append(event.sentence)} | options)
        for number, server in enumerate(servers):
            fleet.join(f"server {number}", server.url)
        client = await stack.enter_async_context(EngineClient(fleet, "key", request_timeout_s=5.0, traffic=traffic, most=most))
        yield servers, fleet, client, said
