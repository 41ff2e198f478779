"""`ctpo serve-agents` is killed and stopped while a client plays, and started again: nothing that it gave or took is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from openai import AsyncOpenAI

from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.toy.model import make_toy_model
from tests.support.serving_agents import LINES, SECOND_QUESTION

LIMIT_S = 500.0
TASK = {"messages": [{"role": "user", "content": "What is 1 + 1?"}], "answer": "2"}
AGAIN = {"role": "user", "content": f"Are you {SECOND_QUESTION}?"}


class Servers:
    """Servers of one run, one after the other, forked by a process that has imported all of it."""

    def __init__(self, run_dir: Path, model: Path) -> None:
        self.run_dir, self._log = run_dir, (run_dir / "forks.log").open("wb")
        self._forks = subprocess.Popen(
            [sys.executable, "-m", "tests.support.serving_agents", str(run_dir), str(model)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            text=True,
            bufsize=1,
        )
        self._pid = 0

    async def start(self) -> None:
        """Returns when it serves."""
        addresses = self.run_dir / "agents.json"
        before = addresses.stat().st_mtime_ns if addresses.exists() else 0
        self._pid = await self._asked("start")
        await self.until(lambda: addresses.exists() and addresses.stat().st_mtime_ns > before)

    async def end(self, by: signal.Signals) -> int:
        """Returns its exit code."""
        os.kill(self._pid, by)
        return await self._asked("wait")

    async def until(self, reached: Callable[[], bool]) -> None:
        """Returns when `reached`."""
        async with asyncio.timeout(LIMIT_S):
            while not reached():
                assert psutil.Process(self._pid).status() != psutil.STATUS_ZOMBIE, (self.run_dir / "log").read_text()
                await asyncio.sleep(0.01)

    async def _asked(self, word: str) -> int:
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._forks.stdin.write(word + "\n")
        async with asyncio.timeout(LIMIT_S):
            said = await asyncio.to_thread(self._forks.stdout.readline)
        assert said, (self.run_dir / "forks.log").read_text()
        return int(said)

    def close(self) -> None:
        """End what is left."""
        os.killpg(self._forks.pid, signal.SIGKILL)
        self._forks.wait()
        self._log.close()


async def admin(run_dir: Path, path: str = "", body: Any = None) -> Any:
    url = json.loads((run_dir / "agents.json").read_text())["attempts"]
    headers = {"Authorization": f"Bearer {(run_dir / 'agents.key').read_text().strip()}"}
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body, headers=headers) as answer:
        return await answer.json()


class Client:
    """A client of OpenAI's that repeats what is cut off, and what it was given."""

    def __init__(self, made: dict[str, Any]) -> None:
        self._client = AsyncOpenAI(base_url=made["openai_url"], api_key=made["api_key"], max_retries=40)
        self.given: list[tuple[str, list[int]]] = []

    async def ask(self, *messages: dict[str, str]) -> None:
        extra = {"return_token_ids": True}
        answer = await self._client.chat.completions.create(model="policy", messages=[*messages], extra_body=extra)
        (choice,) = answer.choices
        self.given.append((choice.message.content or "", choice.token_ids))  # type: ignore[attr-defined]

    async def play(self) -> None:
        await self.ask(*TASK["messages"])
        await self.ask(*TASK["messages"], {"role": "assistant", "content": self.given[0][0]}, AGAIN)

    async def close(self) -> None:
        await self._client.close()


def test_a_client_plays_on_when_the_server_is_back(tmp_path: Path) -> None:
    """It is killed within the first turn and stopped within the second: the client sees answers that took longer, no more."""
    model, run_dir = make_toy_model(tmp_path / "model", seed=1), tmp_path / "run"
    run_dir.mkdir()
    for turn in range(2):
        (run_dir / f"hold.{turn}").touch()

    async def play() -> tuple[Client, dict[str, Any], dict[str, Any]]:
        await servers.start()
        made = await admin(run_dir, body=TASK)
        client = Client(made)
        playing = asyncio.create_task(client.play())
        await servers.until((run_dir / "sampling.0").exists)
        assert await servers.end(signal.SIGKILL) == -signal.SIGKILL
        (run_dir / "hold.0").unlink()
        await servers.start()
        await servers.until((run_dir / "sampling.1").exists)
        assert await servers.end(signal.SIGTERM) == 0
        (run_dir / "hold.1").unlink()
        await servers.start()
        async with asyncio.timeout(LIMIT_S):
            await playing
        closed = await admin(run_dir, f"/{made['attempt']}/close", {})
        assert await admin(run_dir, f"/{made['attempt']}/close", {}) == closed
        await client.close()
        return client, closed, await admin(run_dir, body=TASK)

    servers = Servers(run_dir, model)
    try:
        client, closed, second = asyncio.run(play())
    finally:
        servers.close()
    chat = ChatTokenizer(model)
    assert [text for text, _ in client.given] == list(LINES)
    assert closed == {"attempt": "g00000000.0", "status": "finished", "reward": 1.0, "turns": 2, "branches": 0}
    assert second["attempt"] == "g00000001.0"
    (row,) = [json.loads(line) for line in (run_dir / "rollouts" / "agents.jsonl").read_text().splitlines()]
    sampled = [turn for turn in row["turns"] if turn["role"] == "assistant"]
    assert [turn["token_ids"] for turn in sampled] == [ids for _, ids in client.given] == [*map(chat.assistant_ids, LINES)]
    assert [turn["rollout_logp"][-1] for turn in sampled] == [-(len(turn["token_ids"]) - 1) / 64 for turn in sampled]
