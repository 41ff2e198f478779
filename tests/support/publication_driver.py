"""What a run's driver does in the tests of publications: servers, a fleet, a client and a publisher on rank 0 of a trainer."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import requests

from ctpo_megatron.config.weights import Transport
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Fleet, State
from ctpo_megatron.engine.server import new_api_key
from ctpo_megatron.mcore.rank import RankInfo
from ctpo_megatron.types import Generation
from ctpo_megatron.weights.publisher import WeightPublisher
from tests.support.engines import START_S, TIMEOUT_S, RunningServer, in_flight, start_server
from tests.support.publication_ranks import Rank, Ranks, follow

PROMPT = list(range(7, 71))
SESSIONS = 8  # spread evenly over the servers
SAMPLED = 20  # tokens of each generation, at least, before an update meets it
LONG = 1600  # tokens of such a generation: several times what is sampled until the update pauses it


class Driver:
    """What a run's driver has, on rank 0: trainer, servers, client and publisher."""

    def __init__(self, rank: Rank, servers: list[RunningServer], client: EngineClient, said: list[str], forks: Path) -> None:
        self.trainer, self.servers, self.client, self.said = Ranks(rank), servers, client, said
        self.start_server = functools.partial(start_server, forks=forks)
        self.fleet = client.fleet
        self.publisher = self._new_publisher(TIMEOUT_S)
        self.version = 0

    def _new_publisher(self, timeout_s: float, *, session: bool = True) -> WeightPublisher:
        first = self.servers[0]
        common = {"api_key": first.api_key, "timeout_s": timeout_s, "session": session}
        return WeightPublisher(self.fleet, self.client.control, self.trainer, first.proof(), **common)

    async def use(self, transport: Transport) -> None:
        """From now on versions travel by `transport`."""
        await self.trainer.all("use", transport)
        self.publisher = self._new_publisher(transport.timeout_s, session=transport.type != "disk")

    async def publish(self, fault: str | None = None, only: str = "") -> dict[str, float]:
        """A new version, in whose publication something goes wrong."""
        await self.prepare(fault, only)
        return await self.publish_prepared()

    async def prepare(self, fault: str | None = None, only: str = "") -> None:
        """All of `publish` that comes before the servers hear of it."""
        await self.trainer.all("move", only)
        await self.trainer.all("plant", fault)

    async def publish_prepared(self) -> dict[str, float]:
        self.version += 1
        return await self.publisher.publish(self.version)

    async def sampling(
        self, tokens: int, client: EngineClient | None = None, at: RunningServer | None = None
    ) -> list[asyncio.Task[Generation]]:
        """Generations on all servers; all of them, or those `at` one, have sampled some tokens already."""
        running = [self.generate(session, tokens, client) for session in range(SESSIONS)]
        each, used = SESSIONS // len(self.servers), len(PROMPT) + SAMPLED
        waited_for = [at] if at else self.servers
        await asyncio.gather(*(in_flight(one.url, one.api_key, running=each, tokens=used) for one in waited_for))
        return running

    def generate(self, session: int, tokens: int, client: EngineClient | None = None) -> asyncio.Task[Generation]:
        options = {"temperature": 1.0, "stop_token_ids": [], "session": session}
        return asyncio.ensure_future((client or self.client).generate(PROMPT, max_new_tokens=tokens, **options))

    async def cached_tokens(self, server: RunningServer) -> int:
        """How much of the prompt the server takes from its prefix cache."""
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
        key = {"Authorization": f"Bearer {server.api_key}"}
        answer = await asyncio.to_thread(requests.post, f"{server.url}/generate", json=body, headers=key, timeout=TIMEOUT_S)
        return answer.json()["meta_info"]["cached_tokens"]

    def spoken(self) -> str:
        """What was told of the servers since the last time."""
        text = "\n".join(self.said)
        self.said.clear()
        return text

    def serving(self) -> list[str]:
        return [member.name for member in self.fleet.members(State.SERVING)]


@asynccontextmanager
async def driving(
    info: RankInfo, model: Path, root: Path, servers: int, restarts: int, forks: Path
) -> AsyncIterator[Driver | None]:
    """On rank 0 a driver; None on the others, which then follow it."""
    async with AsyncExitStack() as stack:
        running: list[RunningServer] = []
        if info.rank == 0:
            key = new_api_key()
            for number in range(servers):
                running.append(start_server(model, root / f"server_{number}.log", wait=False, key=key, forks=forks))
            stack.callback(lambda: [server.server.stop() for server in running])
        rank = Rank(model, info, TIMEOUT_S)
        stack.callback(rank.close)
        if info.rank > 0:
            yield None
            follow(rank)
            return
        said: list[str] = []
        fleet = Fleet(patience_s=TIMEOUT_S, restarts=restarts, emit=lambda event: said.append(event.sentence))
        for number, server in enumerate(running):
            await asyncio.to_thread(server.server.wait_healthy, START_S)
            fleet.join(f"server {number}", server.url)
        client = await stack.enter_async_context(EngineClient(fleet, running[0].api_key, request_timeout_s=TIMEOUT_S))
        driver = Driver(rank, running, client, said, forks)
        stack.callback(driver.trainer.end)
        yield driver


def check_in_flight(generations: list[tuple[list[int], int, int]]) -> None:
    """None is missing a token; versions only grow, to the current one; some carry both."""
    assert [length for _, length, _ in generations] == [LONG] * SESSIONS
    for versions, _, current in generations:
        assert versions == sorted(versions)
        assert set(versions) <= {current - 1, current}
    assert any(len(set(versions)) == 2 for versions, _, _ in generations), "no generation was in flight during the update"
