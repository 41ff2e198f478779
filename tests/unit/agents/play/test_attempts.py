"""Attempts of agents from elsewhere: opened, played, closed, kept over a restart; over HTTP as their users do it."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ctpo_megatron.agents.http.keys import KeyedEpisodes
from ctpo_megatron.agents.http.server import AgentServer
from ctpo_megatron.agents.play.admin import Admin
from ctpo_megatron.agents.play.attempts import OpenAttempts
from ctpo_megatron.agents.play.environment import Endpoint
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.protocols import Outcome, Reward, Sampling, Score
from ctpo_megatron.types import Prompt
from tests.support.agents import ADD, Engine, Hermes, hermes
from tests.support.chats import loader
from tests.unit.agents.play.test_environment import Said

KEY = "sk-of-the-run"
TASK = {"messages": [{"role": "user", "content": "What is 1 + 1?"}], "answer": "2"}
CALL, ANSWER = hermes("add", '{"a": 1, "b": 1}'), "It is \\boxed{2}."


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return loader(lambda: tmp_path_factory.mktemp("model") / "m")("qwen2.5")


class Site:
    """A running `serve-agents` around an engine that says its lines."""

    def __init__(self, url: str, session: aiohttp.ClientSession, attempts: OpenAttempts, engine: Engine) -> None:
        self.url, self.attempts, self.engine, self._session = url, attempts, engine, session

    async def admin(self, method: str, path: str, body: Any = None, key: str = KEY) -> tuple[int, Any]:
        given = {"data": body} if isinstance(body, str) else {"json": body}
        headers = {"Authorization": f"Bearer {key}"}
        async with self._session.request(method, f"{self.url}{path}", headers=headers, **given) as answer:
            return answer.status, await answer.json()

    async def ask(self, made: dict[str, Any], messages: list[dict[str, Any]]) -> tuple[int, Any]:
        body = {"model": made["model"], "messages": messages, "tools": [ADD]}
        headers = {"Authorization": f"Bearer {made['api_key']}"}
        async with self._session.post(f"{made['openai_url']}/chat/completions", json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def said(self, made: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
        status, answer = await self.ask(made, messages)
        assert status == 200, answer
        return answer["choices"][0]["message"]


@asynccontextmanager
async def site(
    chat: ChatTokenizer, run_dir: Path, *lines: str, timeout_s: float = 3600.0, most: int = 8, reward: Reward | None = None
) -> AsyncIterator[Site]:
    engine, episodes = Engine(chat, list(lines or (CALL, ANSWER))), KeyedEpisodes()
    async with AgentServer(episodes) as server, aiohttp.ClientSession() as session:
        endpoint = Endpoint(server, episodes, chat, Hermes(), 500)
        sampling, judge = Sampling(1.0, 5, 400), reward or Said()
        attempts = OpenAttempts(endpoint, engine, judge, run_dir, sampling=sampling, timeout_s=timeout_s, most=most)
        try:
            async with Admin(attempts, server, key=KEY, model="m", timeout_s=timeout_s).serving("127.0.0.1", 0) as url:
                yield Site(url, session, attempts, engine)
        finally:
            await attempts.leave()


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "rollouts" / "agents.jsonl").read_text().splitlines()]


def result(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "2"}


def test_an_attempt_from_its_opening_to_its_verdict(chat: ChatTokenizer, tmp_path: Path) -> None:
    async def play() -> None:
        async with site(chat, tmp_path) as one:
            status, made = await one.admin("POST", "/attempts", TASK)
            assert (status, made["attempt"]) == (201, "g00000000.0")
            assert "answer" not in made
            messages = [*TASK["messages"]]
            first = await one.said(made, messages)
            assert (await one.said(made, [*messages, first, result(first)]))["content"] == ANSWER
            status, closed = await one.admin("POST", "/attempts/g00000000.0/close")
            assert (status, closed) == (
                200,
                {"attempt": "g00000000.0", "status": "finished", "reward": 1.0, "turns": 2, "branches": 0},
            )
            assert (await one.ask(made, messages))[0] == 401  # its key opens nothing any more
            again = await one.admin("POST", "/attempts/g00000000.0/close", {"reward": 0.0})
            assert again == (200, closed), "who did not hear what it came to is told again"
            for name in ("g00000001.0", "g00000000.1", "g0.0", "0", "x"):
                assert (await one.admin("POST", f"/attempts/{name}/close"))[0] == 404
        (row,) = rows(tmp_path)
        assert (row["id"], row["reward"], [turn["role"] for turn in row["turns"]]) == (
            "g00000000.0",
            1.0,
            ["assistant", "tool", "assistant"],
        )
        assert [turn["token_ids"] for turn in row["turns"]][::2] == [sampled.token_ids for _, sampled in one.engine.log]
        assert not list((tmp_path / "attempts").iterdir())

    asyncio.run(play())


def test_verdicts_from_outside(chat: ChatTokenizer, tmp_path: Path) -> None:
    async def play() -> None:
        async with site(chat, tmp_path, ANSWER) as one:
            bare = {"messages": TASK["messages"]}
            for number, (task, body, status, reward) in enumerate(
                [
                    (bare, {"reward": 0.25}, 200, 0.25),
                    (TASK, {"text": "\\boxed{3}"}, 200, 0.0),
                    (bare, {}, 409, None),  # nothing to grade it by
                    (TASK, {"reward": "much"}, 400, None),
                    (TASK, {"reward": 1.0, "text": "x"}, 400, None),
                ]
            ):
                _, made = await one.admin("POST", "/attempts", task)
                await one.said(made, TASK["messages"])
                found, said = await one.admin("POST", f"/attempts/g{number:08d}.0/close", body)
                assert (found, said.get("reward")) == (status, reward), said
            _, made = await one.admin("POST", "/attempts", TASK)
            status, said = await one.admin("POST", f"/attempts/{made['attempt']}/close", {})
            assert (status, said["status"]) == (200, None)  # nothing was sampled, so nothing is kept
        assert [row["reward"] for row in rows(tmp_path)] == [0.25, 0.0]

    asyncio.run(play())


def test_who_has_no_key_and_what_is_no_task(chat: ChatTokenizer, tmp_path: Path) -> None:
    async def play() -> None:
        async with site(chat, tmp_path, most=1) as one:
            assert (await one.admin("POST", "/attempts", TASK, key="sk-other"))[0] == 401
            assert (await one.admin("GET", "/attempts", key=""))[0] == 401
            for body in ("{", "[]", '{"messages": 1}', '{"messages": [], "reward": 1}', '{"messages": [], "answer": 2}'):
                status, said = await one.admin("POST", "/attempts", body)
                assert status == 400, said
                assert said["error"]
            assert (await one.admin("POST", "/attempts", "x" * 2_000_000))[0] == 413
            assert (await one.admin("GET", "/elsewhere"))[0] == 404
            status, made = await one.admin("POST", "/attempts", TASK)
            assert status == 201
            assert (await one.admin("POST", "/attempts", TASK))[0] == 429
            assert (await one.admin("GET", "/attempts"))[1]["open"].keys() == {"g00000000.0"}
            assert (await one.admin("POST", "/attempts", TASK, key=made["api_key"]))[0] == 401  # an attempt's is not the run's
            assert (await one.ask(made | {"api_key": KEY}, TASK["messages"]))[0] == 401  # nor the other way round

    asyncio.run(play())


def test_attempts_are_open_again_after_a_restart(chat: ChatTokenizer, tmp_path: Path) -> None:
    async def play() -> None:
        async with site(chat, tmp_path) as one:
            _, made = await one.admin("POST", "/attempts", TASK)
            _, other = await one.admin("POST", "/attempts", TASK)
            first = await one.said(made, TASK["messages"])
            files = sorted((tmp_path / "attempts").iterdir())
            assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
            # written when the turn was whole, so one that is killed now has it too
            assert (tmp_path / "attempts" / f"{made['attempt']}.tree") in files
        async with site(chat, tmp_path, ANSWER) as two:
            port = two.attempts._endpoint.server.port
            made["openai_url"] = f"http://127.0.0.1:{port}/{made['openai_url'].split('/', 3)[3]}"
            assert (await two.admin("GET", "/attempts"))[1]["open"].keys() == {made["attempt"], other["attempt"]}
            last = await two.said(made, [*TASK["messages"], first, result(first)])
            assert last["content"] == ANSWER
            _, closed = await two.admin("POST", f"/attempts/{made['attempt']}/close")
            assert (closed["turns"], closed["branches"], closed["reward"]) == (2, 0, 1.0)
            _, third = await two.admin("POST", "/attempts", TASK)
            assert third["attempt"] == "g00000002.0"  # no name is used twice
        (row,) = rows(tmp_path)
        logged = [sampled.token_ids for engine in (one.engine, two.engine) for _, sampled in engine.log]
        assert [turn["token_ids"] for turn in row["turns"] if turn["role"] == "assistant"] == logged

    asyncio.run(play())


def test_a_closing_that_was_cut_off_is_not_made_twice(chat: ChatTokenizer, tmp_path: Path) -> None:
    async def play() -> None:
        async with site(chat, tmp_path, ANSWER) as one:
            _, made = await one.admin("POST", "/attempts", TASK)
            await one.said(made, TASK["messages"])
            left = {path: path.read_bytes() for path in (tmp_path / "attempts").iterdir()}
            await one.admin("POST", f"/attempts/{made['attempt']}/close")
        for path, data in left.items():  # the process ended before they were deleted
            path.write_bytes(data)
        async with site(chat, tmp_path) as two:
            assert two.attempts.open == {}
            assert not list((tmp_path / "attempts").iterdir())
            status, again = await two.admin("POST", f"/attempts/{made['attempt']}/close")
            assert (status, again["status"], again["reward"], again["turns"]) == (200, "finished", 1.0, 1)
            _, second = await two.admin("POST", "/attempts", TASK)
            await two.admin("POST", f"/attempts/{second['attempt']}/close")  # nothing was sampled in it
        async with site(chat, tmp_path) as three:
            assert (await three.admin("POST", f"/attempts/{second['attempt']}/close"))[1]["status"] is None
            assert (await three.admin("POST", "/attempts", TASK))[1]["attempt"] == "g00000002.0"  # no name is used twice
        assert len(rows(tmp_path)) == 1

    asyncio.run(play())


class Down:
    """A judge that is not reached, `fails` times; what was asked of it waits for `heard`."""

    def __init__(self, fails: int) -> None:
        self.fails, self.heard = fails, asyncio.Event()

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        await self.heard.wait()
        self.fails -= 1
        if self.fails >= 0:
            raise RolloutError("no verdict from the judge")
        return await Said().score(prompt, outcome)


def test_an_attempt_stays_open_while_nobody_comes_to_a_verdict(chat: ChatTokenizer, tmp_path: Path) -> None:
    async def play() -> None:
        judge = Down(fails=1)
        async with site(chat, tmp_path, ANSWER, reward=judge) as one:
            _, made = await one.admin("POST", "/attempts", TASK)
            await one.said(made, TASK["messages"])
            path = f"/attempts/{made['attempt']}/close"
            first, second = asyncio.ensure_future(one.admin("POST", path)), asyncio.ensure_future(one.admin("POST", path))
            judge.heard.set()
            found = sorted(await asyncio.gather(first, second), key=lambda each: each[0])
            assert [status for status, _ in found] == [200, 503]
            assert found[0][1]["reward"] == 1.0
            assert "close it again" in found[1][1]["error"]
            assert await one.admin("POST", path) == found[0]
            _, other = await one.admin("POST", "/attempts", TASK)
            await one.said(other, TASK["messages"])
        assert len(rows(tmp_path)) == 1

        late = Down(fails=9)
        late.heard.set()
        async with site(chat, tmp_path, timeout_s=0.0, reward=late) as two:
            closing = asyncio.ensure_future(two.attempts.close_late_ones())
            async with asyncio.timeout(60):
                while two.attempts.open:
                    await asyncio.sleep(0.01)
            closing.cancel()
        row = rows(tmp_path)[1]
        found = [row[key] for key in ("status", "reward", "undecided", "why")]
        assert found == ["deadline", 0.0, True, "no verdict from the judge"]

    asyncio.run(play())


def test_an_attempt_that_nobody_closes_ends_with_its_time(chat: ChatTokenizer, tmp_path: Path) -> None:
    async def play() -> None:
        async with site(chat, tmp_path, ANSWER) as one:
            for task in (TASK, {"messages": TASK["messages"]}):
                _, made = await one.admin("POST", "/attempts", task)
                await one.said(made, TASK["messages"])
        async with site(chat, tmp_path, timeout_s=0.0) as two:  # it is over by now
            closing = asyncio.ensure_future(two.attempts.close_late_ones())
            async with asyncio.timeout(60):
                while two.attempts.open:
                    await asyncio.sleep(0.01)
            closing.cancel()
        assert [(row["status"], row["reward"], row["undecided"]) for row in rows(tmp_path)] == [
            ("deadline", 1.0, False),
            ("deadline", 0.0, True),
        ]

    asyncio.run(play())
