"""Episodes on a server of the published openenv package, whose ways the adapter knows.

pip fetches the package and websockets once, into a cache, without what they need besides, so that nothing of this environment
changes. Where the registry is out of reach these tests are skipped.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from ctpo_megatron.config.environments import OpenEnvEnvironment
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.worlds.openenv import OpenEnvWorld
from ctpo_megatron.types import Parsed, Prompt
from tests.support import openenv_server

PACKAGES = ("openenv==0.10.0", "websockets==17.4")
PROMPT = Prompt(0, ({"role": "user", "content": "q"},), "")


def fetched() -> Path:
    """The folder with PACKAGES, from the cache where it is there."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctpo_megatron"
    target = home / "-".join(PACKAGES).replace("==", "-")
    if not target.is_dir():
        work = target.with_name(f"{target.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries=0", "--target", str(work), *PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            shutil.rmtree(work, ignore_errors=True)
            pytest.skip(f"{', '.join(PACKAGES)} cannot be fetched: {done.stderr.strip()[-200:]}")
        try:
            work.rename(target)
        except OSError:  # another worker was quicker
            shutil.rmtree(work)
    return target


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    packages = fetched()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    # -P: tests/support has modules that are called as the standard library's
    server = subprocess.Popen([sys.executable, "-P", openenv_server.__file__, str(packages), str(port)])
    try:
        ends = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < ends, "the server does not listen"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def test_an_episode_and_the_ways_that_the_adapter_is_made_for(url: str) -> None:
    """Where the last three lines fail, a release has other ways: one session, errors by code, rewards after the end."""

    async def check() -> None:
        config = OpenEnvEnvironment(url=url, observation_key="text", reset={"seed": 3})
        world, other = OpenEnvWorld(config), OpenEnvWorld(config.model_copy(update={"session_wait_s": 0.1}))
        try:
            assert await world.reset(PROMPT) == "begin 3"
            first = await world.step(Parsed("a", "I think"))
            assert (first.text, first.reward, first.done) == ("1: a", 0.5, False)
            assert (await world.step(Parsed("b"))).done
            with pytest.raises(RolloutError, match="no free session"):
                await other.reset(PROMPT)
            after = await world.step(Parsed("c"))
            assert (after.reward, after.done) == (0.5, True)
        finally:
            await other.close()
            await world.close()
        follows = OpenEnvWorld(config)
        try:
            assert await follows.reset(PROMPT) == "begin 3"
        finally:
            await follows.close()

    asyncio.run(check())


def test_http_keeps_no_episode(url: str) -> None:
    """Why the adapter speaks by the websocket."""

    async def check() -> tuple[int, int]:
        async with (
            aiohttp.ClientSession(url) as http,
            http.post("/reset", json={}) as begun,
            http.post("/step", json={"action": {"message": "a"}}) as step,
        ):
            return begun.status, step.status

    assert asyncio.run(check()) == (200, 500), "the step meets another game, which has not begun"
