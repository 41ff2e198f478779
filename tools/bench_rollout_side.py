"""One side of tools/bench_rollout.py: a server and a controller of the tree that PYTHONPATH names, which sample when told to.

It speaks JSON lines. First it says `{"ready": ...}`; then each line it reads, `{"groups": ..., "group_size": ...}`, is a round,
and is answered with what that took. It ends at the end of its input. Only what both trees have is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from ctpo_megatron.config.rollout import EngineConfig, RolloutConfig
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.engine.server import SGLangServer, new_api_key
from ctpo_megatron.engine.server_args import server_args, server_env
from ctpo_megatron.ports import free_port
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.rollout.tools import make_tool
from ctpo_megatron.types import GroupId, Prompt

HOST = "127.0.0.1"
START_S = 300.0


def cpu_seconds(servers: list[SGLangServer]) -> dict[str, float]:
    """CPU seconds of the controller and of all processes of the servers so far, by what they are."""
    found: dict[str, float] = defaultdict(float)
    found["controller"] = time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)
    https = [server.pid for server in servers]
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            title = process.cmdline()[0]
            named = "server: scheduler" if "scheduler" in title else "other"
            times = process.cpu_times()
            found["server: http" if process.pid in https else named] += times.user + times.system
    return dict(found)


async def play(
    rollouter: Rollouter,
    prompts: list[Prompt],
    sampling: Sampling,
    first: int,
    order: dict[str, Any],
    servers: list[SGLangServer],
) -> dict[str, Any]:
    """A round: all groups at once, as many trajectories in flight as the rollouter allows."""
    before, begun = cpu_seconds(servers), time.perf_counter()
    ids = range(first, first + order["groups"])
    calls = [
        rollouter.group(prompts[each % len(prompts)], GroupId(each), size=order["group_size"], sampling=sampling) for each in ids
    ]
    groups = await asyncio.gather(*calls)
    seconds, after = time.perf_counter() - begun, cpu_seconds(servers)
    trajectories = [each for group in groups for each in group.trajectories]
    lengths = sorted(each.sampled_length for each in trajectories)
    return {
        "seconds": seconds,
        "tokens": sum(lengths),
        "lengths": [lengths[0], lengths[len(lengths) // 2], lengths[-1]],
        "reward": sum(each.reward for each in trajectories) / len(trajectories),
        "cpu": {kind: after[kind] - before.get(kind, 0.0) for kind in after},
        "rss": {"controller": psutil.Process().memory_info().rss},
    }


def math_reward(config: Any) -> Any:
    """The reward of known answers, which older builds have one module higher."""
    module = importlib.import_module("ctpo_megatron.rollout.rewards")
    if not hasattr(module, "MathReward"):
        module = importlib.import_module("ctpo_megatron.rollout.rewards.math")
    return module.MathReward(config)


async def serve(task: dict[str, Any], servers: list[SGLangServer], key: str) -> None:
    """Play the rounds that are asked for, until the end of the input."""
    fleet = Fleet(patience_s=60)
    fleet.serve([fleet.join(f"server {number}", server.url) for number, server in enumerate(servers)], 0)
    reward = math_reward(RolloutConfig().reward)
    prompts = [Prompt(number, tuple(each["messages"]), each["answer"]) for number, each in enumerate(task["prompts"])]
    config = RolloutConfig.model_validate(task["rollout"])
    sampling = Sampling(1.0, config.max_turns, config.max_response_tokens, record=True)
    chat, journal = ChatTokenizer(task["model"]), Journal(Path(task["folder"]) / "journal", "bench")
    journal.published(0, "first")
    try:
        async with EngineClient(fleet, key, request_timeout_s=600.0) as client:
            rollouter = Rollouter(ToolEnvironment(client, chat, make_tool(config.tool), reward), config, journal, client)
            print(json.dumps({"ready": os.getpid(), "server": servers[0].pid}), flush=True)
            first = 0
            while line := await asyncio.to_thread(sys.stdin.readline):
                order = json.loads(line)
                print(json.dumps(await play(rollouter, prompts, sampling, first, order, servers)), flush=True)
                first += order["groups"]
    finally:
        reward.close()
        journal.close()


def start(task: dict[str, Any], engine: EngineConfig, number: int, key: str) -> SGLangServer:
    """A server of the task's model, not yet healthy."""
    port = free_port(HOST)
    arguments = server_args(task["model"], engine, device="cpu", dtype="float32", port=port, seed=1 + number)
    return SGLangServer(
        arguments,
        url=f"http://{HOST}:{port}",
        api_key=key,
        log=Path(task["folder"]) / f"server_{number}.log",
        env=server_env(engine, device="cpu") | task.get("env", {}),
    )


def main(task: dict[str, Any]) -> None:
    """Start the servers and serve; nothing of them is left afterwards."""
    engine, key = EngineConfig.model_validate(task["rollout"].get("engine", {})), new_api_key()
    servers: list[SGLangServer] = []
    try:
        for number in range(engine.servers):
            servers.append(start(task, engine, number, key))
        for server in servers:
            server.wait_healthy(START_S)
        asyncio.run(serve(task, servers, key))
    finally:
        for server in servers:
            server.stop()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
