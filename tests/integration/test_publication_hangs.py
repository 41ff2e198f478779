"""Publications to two real servers by shared memory and by disk, and servers that hang: while they sample, and in mid-update."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.config.weights import BroadcastTransport, ColocatedTransport, DiskTransport, Transport
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Member, State
from ctpo_megatron.mcore.rank import RankInfo
from tests.support.hanging import stop, stopped
from tests.support.publication_driver import LONG, SESSIONS, Driver, check_in_flight, driving
from tests.support.ranks import run_ranks
from tests.support.tiny import FAMILIES, write_model

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(500)]

ANSWER_S = 24.0  # that a client waits for an answer
PAUSE_S = 6.0
PROBE_S = 4.0  # that senders give a server to say what it is
ALIVE_S = 5.0
UPDATE_S = 10.0  # that senders wait for a server
SHORT = 600  # tokens; sampled in less than ANSWER_S, and not before the server is stopped
BOTH = ["server 0", "server 1"]


def hangs(info: RankInfo, model: Path, root: Path, forks: Path) -> dict[str, Any]:
    """The scenario of `test_other_transports_and_servers_that_hang`."""

    async def scenario() -> dict[str, Any]:
        found: dict[str, Any] = {}
        common = {"delta": True, "timeout_s": 60.0}
        async with driving(info, model, root, servers=2, restarts=2, forks=forks) as driver:
            if driver is not None:
                for transport in (ColocatedTransport(**common), DiskTransport(directory=str(root / "versions"), **common)):
                    found[transport.type] = await whole_and_part(driver, transport)
                found["sampling"] = await hangs_while_sampling(driver)
                found["updating"] = await hangs_in_an_update(driver)
        return found

    return asyncio.run(scenario())


@contextmanager
def impatient() -> Iterator[None]:
    """The publisher, and the first sender, give a server that hangs up sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctpo_megatron.weights.transports.sender.PROBE_TIMEOUT_S", PROBE_S)
        patch.setattr("ctpo_megatron.weights.publisher.PAUSE_TIMEOUT_S", PAUSE_S)
        patch.setattr("ctpo_megatron.weights.publisher.ALIVE_TIMEOUT_S", ALIVE_S)
        yield


async def whole_and_part(driver: Driver, transport: Transport) -> dict[str, Any]:
    """All weights, a delta, and, where buckets travel, one expert that stays behind."""
    await driver.use(transport)
    del driver.trainer.sent[:]
    await driver.publish()
    metrics = await driver.publish(only="linear_qkv")
    found = {"sent": [sent.tensors for sent in driver.trainer.sent], "changed": metrics["publish/changed"]}
    found |= {"said": driver.spoken(), "serving": driver.serving()}
    if transport.type == "colocated":
        await driver.publish("stale")
        found["stale"] = (driver.spoken(), driver.serving(), [sent.tensors for sent in driver.trainer.sent[2:]])
    generations = await asyncio.gather(*(driver.generate(session, 8) for session in range(4)))
    found["current"] = [set(each.versions) == {driver.version} for each in generations]
    return found


async def hangs_while_sampling(driver: Driver) -> dict[str, Any]:
    """The second server stands still while nothing is published; the next publication gives it up."""
    victim = driver.servers[1]
    async with EngineClient(driver.fleet, victim.api_key, request_timeout_s=ANSWER_S) as client:
        running = await driver.sampling(SHORT, client, at=victim)
        with stopped(victim):
            generations = await asyncio.gather(*running)
            found = {"tokens": [len(each.token_ids) for each in generations], "said": driver.spoken()}
            found["serving"] = driver.serving()
            with impatient():
                metrics = await driver.publish()
            found |= {"then said": driver.spoken(), "then serving": driver.serving(), "lost": metrics["servers/lost"]}
    # it goes on where it stood, and joins as one that was started again would
    await driver.client.control.version(victim.url)
    driver.fleet.join("server 1", victim.url)
    await driver.publisher.heal()
    found |= {"healed": driver.serving(), "versions": set((await driver.generate(1, 8)).versions), "current": driver.version}
    driver.spoken()
    return found


async def hangs_in_an_update(driver: Driver) -> dict[str, Any]:
    """The second server stands still with a bucket on its way to it."""
    victim, (_, member) = driver.servers[1], driver.fleet.members(State.SERVING)
    await driver.use(BroadcastTransport(timeout_s=UPDATE_S))
    await driver.publish()
    driver.trainer.mine.strike = lambda: stop(victim)
    await driver.prepare("struck")
    running = await driver.sampling(LONG)
    ending, begin = asyncio.ensure_future(end_when_lost(driver, member)), time.monotonic()
    with impatient():
        metrics = await driver.publish_prepared()
    seconds = time.monotonic() - begin
    generations = await asyncio.gather(*running)
    await ending
    return {
        "in flight": [(each.versions, len(each.token_ids), driver.version) for each in generations],
        "said": driver.spoken(),
        "serving": driver.serving(),
        "lost": metrics["servers/lost"],
        "seconds": seconds,
    }


async def end_when_lost(driver: Driver, member: Member) -> None:
    """What `cluster.engines.group` does with a lost server, before it starts it again."""
    await driver.fleet.lost(member)
    await asyncio.to_thread(driver.servers[1].server.stop)


def test_other_transports_and_servers_that_hang(forks: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "", options=FAMILIES["qwen3_moe"] | {"moe_intermediate_size": 64})
    found, _ = run_ranks(2, hangs, model, tmp_path, forks, timeout_s=400)
    for kind in ("colocated", "disk"):
        check_transport(found[kind], kind)
    said, serving, sent = found["colocated"]["stale"]
    assert said.count("is suspended") == said.count("serves again") == 2, said
    assert "model.layers.1.mlp.experts.w13_weight holds something else than was sent" in said
    assert (serving, sent) == (BOTH, [found["colocated"]["sent"][0]] * 2), "all weights again"

    idle = found["sampling"]
    assert idle["tokens"] == [SHORT] * SESSIONS, "no trajectory is lost"
    assert f"server 1 is suspended: {{url}}/generate did not answer within {ANSWER_S:.0f} s" in unnamed(idle["said"])
    assert idle["said"].count("suspended") == 1, idle["said"]
    # before anything is paused: the senders have to be connected anew, and look for the servers first
    found_out = f"publishing weights, looking for the servers: {{url}}/model_info did not answer within {PROBE_S:.0f} s"
    assert f"server 1 is lost: {found_out}" in unnamed(idle["then said"])
    assert (idle["serving"], idle["then serving"], idle["lost"]) == (["server 0"], ["server 0"], 1)
    assert (idle["healed"], idle["versions"]) == (BOTH, {idle["current"]})

    update = found["updating"]
    check_in_flight(update["in flight"])
    assert "server 1 is lost: publishing weights" in update["said"]
    assert "server 0 is" not in update["said"], "it is not to blame"
    assert (update["serving"], update["lost"]) == (["server 0"], 2)
    assert UPDATE_S < update["seconds"] < UPDATE_S + 25


def check_transport(found: dict[str, Any], kind: str) -> None:
    whole, part = found["sent"]
    assert 0 < part < whole / 4, kind
    assert 0 < found["changed"] < 0.2, kind
    assert (found["said"], found["serving"], found["current"]) == ("", BOTH, [True] * 4), kind


def unnamed(text: str) -> str:
    """Without the servers' addresses."""
    return re.sub(r"http://[\d.:]+", "{url}", text)
