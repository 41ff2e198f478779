"""Publications to real servers while things go wrong: planted faults, restarts with old weights, deaths in mid-update.

The publisher runs on rank 0 of a trainer of two pipeline stages (`publication_ranks`); what it saw comes back to the test.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import START_S, TIMEOUT_S, RunningServer, start_server
from publication_ranks import Rank, Ranks, follow, run_config
from ranks import run_ranks
from tiny import FAMILIES, write_model

from ctpo_megatron.cluster.server import new_api_key
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.mcore.engine import RankInfo
from ctpo_megatron.rollout.client import EngineClient, Generation
from ctpo_megatron.rollout.pool import ServerPool, State
from ctpo_megatron.weights.publisher import Publisher

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]

PROMPT = list(range(7, 71))
LONG = 300  # tokens of a generation that an update meets


class Driver:
    """What a run's driver has, on rank 0: trainer, servers, client and publisher."""

    def __init__(self, rank: Rank, servers: list[RunningServer], client: EngineClient, said: list[str]) -> None:
        self.trainer, self.servers, self.client, self.said = Ranks(rank), servers, client, said
        self.pool, first = client.pool, servers[0]
        self.publisher = Publisher(
            self.pool, client.control, self.trainer, first.proof(), api_key=first.api_key, timeout_s=TIMEOUT_S
        )
        self.version = 0

    async def publish(self, fault: str | None = None, only: str = "") -> dict[str, float]:
        """A new version, in whose publication something goes wrong."""
        await self.trainer.all("move", only)
        await self.trainer.all("plant", fault)
        self.version += 1
        return await self.publisher.publish(self.version)

    def generate(self, session: int, tokens: int) -> asyncio.Task[Generation]:
        work = self.client.generate(PROMPT, max_new_tokens=tokens, temperature=1.0, stop_token_ids=[], session=session)
        return asyncio.ensure_future(work)

    async def cached_tokens(self, server: RunningServer) -> int:
        """How much of the prompt the server takes from its prefix cache."""
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
        answer = await self.client._requests.post(f"{server.url}/generate", body)
        return answer["meta_info"]["cached_tokens"]

    def spoken(self) -> str:
        """What the pool has said since the last time."""
        text = "\n".join(self.said)
        self.said.clear()
        return text

    def serving(self) -> list[str]:
        return [member.name for member in self.pool.members(State.SERVING)]


@asynccontextmanager
async def driving(info: RankInfo, model: Path, root: Path, servers: int, restarts: int) -> AsyncIterator[Driver | None]:
    """On rank 0 a driver; None on the others, which then follow it."""
    async with AsyncExitStack() as stack:
        running: list[RunningServer] = []
        if info.rank == 0:
            key = new_api_key()
            for number in range(servers):
                running.append(start_server(model, root / f"server_{number}.log", wait=False, key=key))
            stack.callback(lambda: [server.server.stop() for server in running])
        rank = Rank(run_config(model, root, TIMEOUT_S), info)
        stack.callback(rank.close)
        if info.rank > 0:
            yield None
            follow(rank)
            return
        said: list[str] = []
        pool = ServerPool(patience_s=TIMEOUT_S, restarts=restarts, say=said.append)
        for number, server in enumerate(running):
            await asyncio.to_thread(server.server.wait_healthy, START_S)
            pool.join(f"server {number}", server.url)
        client = await stack.enter_async_context(EngineClient(pool, running[0].api_key, request_timeout_s=TIMEOUT_S))
        driver = Driver(rank, running, client, said)
        stack.callback(driver.trainer.end)
        yield driver


def faults(info: RankInfo, model: Path, root: Path) -> dict[str, Any]:
    """The scenario of `test_faults_are_found_and_mended`."""

    async def scenario() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async with driving(info, model, root, servers=2, restarts=1) as driver:
            if driver is not None:
                found["metrics"] = await driver.publish()
                for fault in ("dropped", "swapped", "stale", "cached"):
                    await driver.publish(fault)
                    found[fault] = (driver.spoken(), driver.serving())
                await in_flight(driver, found)
                await old_weights(driver, found, root)
                await killed(driver, found, root)
        return found

    return asyncio.run(scenario())


async def in_flight(driver: Driver, found: dict[str, Any]) -> None:
    """An update meets generations; before and after, what the prefix cache gives."""
    found["cached before"] = [[await driver.cached_tokens(server) for _ in range(2)] for server in driver.servers]
    await driver.publish()
    found["cached after"] = [[await driver.cached_tokens(server) for _ in range(2)] for server in driver.servers]
    running = [driver.generate(session, LONG) for session in range(8)]
    await asyncio.sleep(0.4)
    await driver.publish()
    generations = await asyncio.gather(*running)
    found["in flight"] = [(each.versions, len(each.token_ids), driver.version) for each in generations]


async def old_weights(driver: Driver, found: dict[str, Any], root: Path) -> None:
    """Somebody starts the second server again, at the same address, with the weights of the beginning."""
    before = driver.servers[1]
    before.server.stop()
    port = int(before.url.rpartition(":")[2])
    log = root / "again.log"
    driver.servers[1] = await asyncio.to_thread(start_server, before.model, log, key=before.api_key, port=port)
    generations = await asyncio.gather(*(driver.generate(session, 8) for session in range(4)))
    found["old"] = {"versions": [set(each.versions) for each in generations], "current": driver.version}
    found["old"] |= {"said": driver.spoken(), "serving": driver.serving()}
    await driver.publisher.heal()
    found["old"] |= {"then said": driver.spoken(), "then serving": driver.serving()}
    generations = await asyncio.gather(*(driver.generate(session, 8) for session in range(4)))
    found["old"]["then versions"] = [set(each.versions) for each in generations]


async def killed(driver: Driver, found: dict[str, Any], root: Path) -> None:
    """The second server is killed while weights are on their way to it, and comes back after the update."""
    running = [driver.generate(session, LONG) for session in range(8)]
    await asyncio.sleep(0.3)
    victim = driver.servers[1]
    driver.trainer.mine.kill = lambda: os.killpg(victim.server.pid, signal.SIGKILL)
    metrics = await driver.publish("killed")
    generations = await asyncio.gather(*running)
    found["killed"] = {
        "in flight": [(each.versions, len(each.token_ids), driver.version) for each in generations],
        "said": driver.spoken(),
        "serving": driver.serving(),
        "metrics": metrics,
    }
    victim.server.stop()
    driver.servers[1] = await asyncio.to_thread(start_server, victim.model, root / "late.log", key=victim.api_key)
    late = driver.pool.join("server 1", driver.servers[1].url)
    odd = await asyncio.gather(*(driver.generate(session, 8) for session in (1, 3, 5)))
    found["killed"] |= {"before healing": [set(each.versions) for each in odd], "state": late.state}
    await driver.publisher.heal()
    found["killed"] |= {"after healing": set((await driver.generate(1, 8)).versions), "healed": driver.serving()}
    found["killed"]["reports"] = await driver.client.control.version(late.url)
    await driver.publish()
    found["killed"]["next"] = driver.serving()


def check_in_flight(generations: list[tuple[list[int], int, int]]) -> None:
    """None is missing a token; versions only grow, to the current one; some carry both."""
    assert [length for _, length, _ in generations] == [LONG] * 8
    for versions, _, current in generations:
        assert versions == sorted(versions)
        assert set(versions) <= {current - 1, current}
    assert any(len(set(versions)) == 2 for versions, _, _ in generations), "no generation was in flight during the update"


def test_faults_are_found_and_mended(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "", options=FAMILIES["qwen3_moe"] | {"moe_intermediate_size": 64})
    found, _ = run_ranks(2, faults, model, tmp_path, timeout_s=450)
    assert found["metrics"]["servers/serving"] == 2
    both, layer = ["server 0", "server 1"], "model.layers.1"
    named = {
        "dropped": "holds something else than was sent",
        "swapped": "model.layers.0.input_layernorm.weight holds something else than was sent",
        "stale": f"{layer}.mlp.experts.w13_weight holds something else than was sent",
        "cached": "computes other log-probs than the trainer",
    }
    for fault, words in named.items():
        said, serving = found[fault]
        assert said.count("is suspended") == 2, (fault, said)
        assert said.count("serves again") == 2, (fault, said)
        assert words in said, (fault, said)
        assert serving == both, fault
    swapped, stale = found["swapped"][0], found["stale"][0]
    assert "model.layers.0.post_attention_layernorm.weight" in swapped
    assert ": 2 of its tensors are not proven" in stale, "the one expert's, and no others"
    assert f"{layer}.mlp.experts.0.gate_proj.weight" in stale

    assert all(second > 0 for _, second in found["cached before"]), "the cache is at work"
    assert [first for first, _ in found["cached after"]] == [0, 0], "of the old version nothing is reused"
    assert all(second > 0 for _, second in found["cached after"])
    check_in_flight(found["in flight"])

    old = found["old"]
    assert old["versions"] == [{old["current"]}] * 4
    assert f"answered with version 0 of the weights; it was given {old['current']}" in old["said"]
    assert old["serving"] == ["server 0"]
    assert (old["then serving"], old["then versions"]) == (both, [{old["current"]}] * 4)

    dead = found["killed"]
    check_in_flight(dead["in flight"])
    assert "server 1 is lost" in dead["said"]
    assert (dead["serving"], dead["metrics"]["servers/lost"]) == (["server 0"], 1)
    current = dead["in flight"][0][2]
    assert (dead["state"], dead["before healing"]) == (State.JOINING, [{current}] * 3)
    assert (dead["after healing"], dead["healed"], dead["reports"]) == ({current}, both, str(current))
    assert dead["next"] == both


def tied(info: RankInfo, model: Path, root: Path) -> dict[str, Any]:
    """The scenario of `test_tied_embeddings_updated_once`."""

    async def scenario() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async with driving(info, model, root, servers=1, restarts=0) as driver:
            if driver is not None:
                await driver.publish()
                found["whole"] = (driver.spoken(), driver.serving())
                try:
                    await driver.publish(only="word_embeddings")
                except WeightSyncError as error:
                    found["once"] = str(error)
        return found

    return asyncio.run(scenario())


def test_tied_embeddings_updated_once(tmp_path: Path) -> None:
    """The last stage of the trainer keeps the old copy: what is sent arrives whole, yet both sides compute different models."""
    model = write_model(tmp_path / "model", "qwen3")
    found, _ = run_ranks(2, tied, model, tmp_path, timeout_s=300)
    assert found["whole"] == ("", ["server 0"]), "tied embeddings are sent, and proven"
    assert "computes other log-probs than the trainer with version 2" in found["once"]
