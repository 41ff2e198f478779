"""`ctpo serve-agents`: the endpoint for agents from elsewhere, over servers that hold model.path, until it is stopped."""

from __future__ import annotations

import asyncio
import json
import os
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ctpo_megatron.agents.http.keys import new_key
from ctpo_megatron.agents.play.admin import Admin
from ctpo_megatron.agents.play.attempts import OpenAttempts
from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.agents import ExternalAgent
from ctpo_megatron.errors import ConfigError, storing
from ctpo_megatron.jobs.endpoint import open_endpoint
from ctpo_megatron.jobs.inputs import open_model, prepare_run_dir
from ctpo_megatron.jobs.rollouts import open_client
from ctpo_megatron.jobs.stop import StopSignal
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.ports import is_free
from ctpo_megatron.record.events import print_sentence
from ctpo_megatron.record.files import write_summary
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.rollout.rewards.opening import open_reward

KEY, ADDRESSES = "agents.key", "agents.json"  # in RUN_DIR


async def serve_agents_job(config: RunConfig, stop: StopSignal) -> None:
    """Serve until a signal. What is open then is open again with the same command."""
    agent = config.rollout.agent
    if not isinstance(agent, ExternalAgent):
        raise ConfigError(
            f"rollout.agent.type={None if agent is None else agent.type}: `ctpo serve-agents` waits for agents from elsewhere; "
            "set rollout.agent={type: external}"
        )
    model = open_model(config, "eval")
    run_dir = prepare_run_dir(config)
    key = _key(run_dir / KEY)
    async with Runtime(config, model.shape, topology_of(config, trainer=False), run_dir, emit=print_sentence) as runtime:
        await runtime.guard(_serve(runtime, agent, model.chat, run_dir, key, stop))


async def _serve(runtime: Runtime, agent: ExternalAgent, chat: ChatTokenizer, run_dir: Path, key: str, stop: StopSignal) -> None:
    rollout = runtime.config.rollout
    agent = with_earlier_ports(agent, run_dir / ADDRESSES)
    sampling = Sampling(
        rollout.temperature, rollout.max_turns, rollout.max_response_tokens, record=True, truncation=rollout.truncation
    )
    async with (
        open_reward(rollout.reward, run_dir) as reward,
        open_client(runtime) as client,
        open_endpoint(agent, runtime.config, chat) as endpoint,
    ):
        attempts = OpenAttempts(
            endpoint, client, reward, run_dir, sampling=sampling, timeout_s=agent.timeout_s, most=agent.max_open
        )
        admin = Admin(attempts, endpoint.server, key=key, model=agent.model, timeout_s=agent.timeout_s)
        closing = asyncio.ensure_future(attempts.close_late_ones())
        try:
            async with admin.serving(agent.host, agent.admin_port) as address:
                host = f"[{agent.host}]" if ":" in agent.host else agent.host
                agents = f"http://{host}:{endpoint.server.port}"
                write_summary(run_dir, {"attempts": f"{address}/attempts", "agents": agents}, name=ADDRESSES)
                print(f"attempts are opened at {address}/attempts, with the key in {run_dir / KEY}; agents ask {agents}")
                await _stopped(stop, closing)
        finally:
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
            await attempts.leave()
    print(f"stopped; {len(attempts.open)} attempts are open, and are open again with the same command")


def with_earlier_ports(agent: ExternalAgent, addresses: Path) -> ExternalAgent:
    """Returns `agent` with the ports of an earlier start, where any would do and these are free: clients find them again."""
    with storing(addresses):
        earlier = json.loads(addresses.read_bytes()) if addresses.exists() else {}
    found = {"admin_port": earlier.get("attempts"), "port": earlier.get("agents")}
    ports = {key: urlsplit(url).port for key, url in found.items() if url and getattr(agent, key) == 0}
    return agent.model_copy(update={key: port for key, port in ports.items() if port and is_free(agent.host, port)})


async def _stopped(stop: StopSignal, closing: asyncio.Future[None]) -> None:
    """Return when a signal comes. Raises what ended the closing of late attempts."""
    asked = asyncio.Event()
    stop.listen(lambda _name: asked.set())
    waiting = asyncio.ensure_future(asked.wait())
    ends: list[asyncio.Future[Any]] = [waiting, closing]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if closing.done():
            closing.result()
    finally:
        waiting.cancel()
        stop.listen(None)


def _key(path: Path) -> str:
    """The run's key: that of an earlier start, or a new one, which only its owner may read."""
    with storing(path):
        if path.exists():
            return path.read_text(encoding="utf-8").strip()
        key = new_key()
        with open(path, "x", encoding="utf-8", opener=partial(os.open, mode=0o600)) as file:
            file.write(key + "\n")
    return key
