"""Publications to real servers while things go wrong: planted faults, restarts with old weights, deaths in mid-update.

The publisher runs on rank 0 of a trainer of two pipeline stages (`publication_ranks`); what it saw comes back to the test.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.engine.fleet import State
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.mcore.rank import RankInfo
from tests.support.publication_driver import LONG, Driver, check_in_flight, driving
from tests.support.ranks import run_ranks
from tests.support.tiny import FAMILIES, write_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def faults(info: RankInfo, model: Path, root: Path, forks: Path) -> dict[str, Any]:
    """The scenario of `test_faults_are_found_and_mended`."""

    async def scenario() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async with driving(info, model, root, servers=2, restarts=1, forks=forks) as driver:
            if driver is not None:
                found["metrics"] = await driver.publish()
                for fault in ("dropped", "swapped", "stale", "cached"):
                    await driver.publish(fault)
                    found[fault] = (driver.spoken(), driver.serving())
                await update_in_flight(driver, found)
                await old_weights(driver, found, root)
                await killed(driver, found, root)
        return found

    return asyncio.run(scenario())


async def update_in_flight(driver: Driver, found: dict[str, Any]) -> None:
    """An update meets generations; before and after, what the prefix cache gives."""
    found["cached before"] = [[await driver.cached_tokens(server) for _ in range(2)] for server in driver.servers]
    await driver.publish()
    found["cached after"] = [[await driver.cached_tokens(server) for _ in range(2)] for server in driver.servers]
    await driver.prepare()
    running = await driver.sampling(LONG)
    await driver.publish_prepared()
    generations = await asyncio.gather(*running)
    found["in flight"] = [(each.versions, len(each.token_ids), driver.version) for each in generations]


async def old_weights(driver: Driver, found: dict[str, Any], root: Path) -> None:
    """Somebody starts the second server again, at the same address, with the weights of the beginning."""
    before = driver.servers[1]
    before.server.stop()
    port = int(before.url.rpartition(":")[2])
    log = root / "again.log"
    driver.servers[1] = await asyncio.to_thread(driver.start_server, before.model, log, key=before.api_key, port=port)
    generations = await asyncio.gather(*(driver.generate(session, 8) for session in range(4)))
    found["old"] = {"versions": [set(each.versions) for each in generations], "current": driver.version}
    found["old"] |= {"said": driver.spoken(), "serving": driver.serving()}
    await driver.publisher.heal()
    found["old"] |= {"then said": driver.spoken(), "then serving": driver.serving()}
    generations = await asyncio.gather(*(driver.generate(session, 8) for session in range(4)))
    found["old"]["then versions"] = [set(each.versions) for each in generations]


async def killed(driver: Driver, found: dict[str, Any], root: Path) -> None:
    """The second server is killed while weights are on their way to it, and comes back after the update."""
    victim = driver.servers[1]
    await driver.publish()  # connects to the server that came back, for seconds: the next update finds generations in flight
    driver.trainer.mine.strike = lambda: os.killpg(victim.server.pid, signal.SIGKILL)
    await driver.prepare("struck")
    running = await driver.sampling(LONG)
    metrics = await driver.publish_prepared()
    generations = await asyncio.gather(*running)
    found["killed"] = {
        "in flight": [(each.versions, len(each.token_ids), driver.version) for each in generations],
        "said": driver.spoken(),
        "serving": driver.serving(),
        "metrics": metrics,
    }
    victim.server.stop()
    driver.servers[1] = await asyncio.to_thread(driver.start_server, victim.model, root / "late.log", key=victim.api_key)
    late = driver.fleet.join("server 1", driver.servers[1].url)
    odd = await asyncio.gather(*(driver.generate(session, 8) for session in (1, 3, 5)))
    found["killed"] |= {"before healing": [set(each.versions) for each in odd], "state": late.state}
    await driver.publisher.heal()
    found["killed"] |= {"after healing": set((await driver.generate(1, 8)).versions), "healed": driver.serving()}
    found["killed"]["reports"] = await driver.client.control.version(late.url)
    await driver.publish()
    found["killed"]["next"] = driver.serving()


@pytest.mark.long
def test_faults_are_found_and_mended(forks: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "", options=FAMILIES["qwen3_moe"] | {"moe_intermediate_size": 64})
    found, _ = run_ranks(2, faults, model, tmp_path, forks, timeout_s=800)
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


def tied(info: RankInfo, model: Path, root: Path, forks: Path) -> dict[str, Any]:
    """The scenario of `test_tied_embeddings_updated_once`."""

    async def scenario() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async with driving(info, model, root, servers=1, restarts=0, forks=forks) as driver:
            if driver is not None:
                await driver.publish()
                found["whole"] = (driver.spoken(), driver.serving())
                try:
                    await driver.publish(only="word_embeddings")
                except WeightSyncError as error:
                    found["once"] = str(error)
        return found

    return asyncio.run(scenario())


def test_tied_embeddings_updated_once(forks: Path, tmp_path: Path) -> None:
    """The last stage of the trainer keeps the old copy: what is sent arrives whole, yet both sides compute different models."""
    model = write_model(tmp_path / "model", "qwen3")
    found, _ = run_ranks(2, tied, model, tmp_path, forks, timeout_s=300)
    assert found["whole"] == ("", ["server 0"]), "tied embeddings are sent, and proven"
    assert "computes other log-probs than the trainer with version 2" in found["once"]
