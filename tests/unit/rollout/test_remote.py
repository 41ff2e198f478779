"""The client of a remote sandbox, against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.config.tools import RemoteTool
from ctpo_megatron.errors import ConfigError, RolloutError
from ctpo_megatron.jobs.journal import recipe
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.protocols import PastCall, Sampling, ToolResult
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.rollout.sandbox import CASES, remote
from ctpo_megatron.rollout.sandbox.key import read_key
from ctpo_megatron.rollout.sandbox.remote import RemotePython
from ctpo_megatron.rollout.tools import make_tool, opened
from tests.support.trajectories import GROUP
from tests.unit.rollout.test_environment import CALL, PROMPT, Boxes, Letters, Script

KEY = "0123456789abcdef-secret"
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)
    monkeypatch.setattr(remote, "PATIENCE_S", 0.0)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    return path


def said(output: str, **more: object) -> web.Response:
    return web.json_response({"output": output, "ok": True, "seconds": 0.1, **more})


class Server:
    """Answers in turn, the last answer for ever; notes what it was asked."""

    def __init__(self, *answers: web.Response | Answer) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, str]] = []  # path, key, body

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.path, request.headers["Authorization"], await request.text()))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not isinstance(answer, web.Response):
            return await answer(request)
        return web.Response(body=answer.body, status=answer.status, headers=answer.headers)

    async def __aenter__(self) -> str:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self.handle)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *_error: object) -> None:
        await self._runner.cleanup()


def ask(server: Server, key_file: Path, code: str = "print(1)", **options: object) -> ToolResult:
    async def run() -> ToolResult:
        async with server as url:
            return await RemotePython(RemoteTool(url=url, key_file=str(key_file), **options)).run(code)

    return asyncio.run(asyncio.wait_for(run(), 60))


async def broken(request: web.Request) -> web.StreamResponse:
    """The connection ends in the middle of an answer."""
    answer = web.StreamResponse(headers={"Content-Length": "100"})
    await answer.prepare(request)
    await answer.write(b'{"output"')
    assert request.transport is not None
    request.transport.abort()
    return answer


async def flood(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    while True:
        await answer.write(b" " * (1 << 16))


@pytest.mark.parametrize(
    "fault",
    [web.Response(status=500), web.Response(status=503), web.Response(text="<html>"), said("", ok="yes"), broken, flood],
)
def test_what_may_pass_is_tried_again(key_file: Path, fault: web.Response | Answer) -> None:
    server = Server(fault, fault, said("7"))
    assert ask(server, key_file).output == "7"
    assert len(server.asked) == 3
    assert len(set(server.asked)) == 1
    assert server.asked[0][:2] == ("/run", f"Bearer {KEY}")


def test_a_sandbox_that_never_answers_is_a_failure_that_names_it_and_not_the_key(key_file: Path) -> None:
    server = Server(web.Response(status=500, text="bubblewrap failed"))
    with pytest.raises(RolloutError, match="gave no answer in 3 tries: 500: bubblewrap failed") as caught:
        ask(server, key_file, retries=2)
    assert KEY not in str(caught.value)
    assert len(server.asked) == 3


def test_a_silent_sandbox_is_given_up(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise AssertionError

    monkeypatch.setattr(remote, "WAITING_S", 0.1)
    with pytest.raises(RolloutError, match=r"in 1 tries: nothing within 0\.2 s"):
        ask(Server(silent), key_file, retries=0, timeout_s=0.1)


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_what_is_refused_is_not_tried_again(key_file: Path, status: int) -> None:
    server = Server(web.Response(status=status, text="no"))
    with pytest.raises(RolloutError, match=f"refused a program: {status}: no"):
        ask(server, key_file)
    assert len(server.asked) == 1


def test_the_key_follows_no_redirection(key_file: Path) -> None:
    async def both() -> None:
        other = Server(said("stolen"))
        async with other as elsewhere:
            server = Server(web.Response(status=307, headers={"Location": f"{elsewhere}/run"}))
            async with server as url:
                with pytest.raises(RolloutError, match="307"):
                    await RemotePython(RemoteTool(url=url, key_file=str(key_file))).run("x")
        assert other.asked == []

    asyncio.run(both())


def test_output_is_as_short_as_the_run_wants_whatever_comes(key_file: Path) -> None:
    assert len(ask(Server(said("x" * 5000)), key_file, max_output_chars=90).output) == 90


def test_the_programs_of_an_attempt_share_a_connection_that_ends_with_it(key_file: Path) -> None:
    async def run() -> None:
        peers = []

        async def note(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            peers.append(request.transport)
            return said("7")

        async with Server(note) as url:
            async with opened(RemotePython(RemoteTool(url=url, key_file=str(key_file))), ()) as tool:
                for _ in range(3):
                    await tool.run("x")
            assert len(set(peers)) == 1
            while not peers[0].is_closing():
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_sandbox_that_is_down_is_no_fault_of_the_model(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt is tried again and ends as if nothing had been; no output tells of it, no error is counted."""
    monkeypatch.setattr("ctpo_megatron.rollout.rollouter.RETRY_PAUSE_S", 0.001)

    async def run() -> None:
        server = Server(web.Response(status=502), web.Response(status=502), said("56"))
        async with server as url:
            tool = RemotePython(RemoteTool(url=url, key_file=str(key_file), retries=0))
            environment = ToolEnvironment(Script([CALL, "\\boxed{56}"]), Letters(), tool, Boxes())
            rollouter = Rollouter(environment, RolloutConfig(retries=2))
            (made,) = (await rollouter.group(PROMPT, GROUP, size=1, sampling=Sampling(1.0, 5, 1000))).trajectories
        assert (made.reward, made.tool_calls, made.tool_errors, len(server.asked)) == (1.0, 1, 0, 3)

    asyncio.run(run())


def test_a_notebook_that_is_not_there_is_made_again_from_its_programs(key_file: Path) -> None:
    async def run() -> None:
        gone = web.Response(status=410)
        server = Server(web.Response(status=500), said("1"), said("2"), gone, gone, said("3"), web.Response(status=204))
        async with server as url:
            tool = RemotePython(RemoteTool(url=url, key_file=str(key_file), notebook=True))
            async with tool.session([PastCall("before", "0")]) as session:
                assert [(await session.run(each)).output for each in ("a", "b", "c")] == ["1", "2", "3"]
        bodies = [json.loads(body) for path, _, body in server.asked if path == "/run"]
        assert [(each["code"], each["cell"]["number"]) for each in bodies] == [*[("a", 2)] * 2, ("b", 3), *[("c", 4)] * 3]
        sent = [None if each["cell"]["past"] is None else [past["code"] for past in each["cell"]["past"]] for each in bodies]
        assert sent == [["before"], ["before"], None, None, ["before", "a", "b"], ["before", "a", "b"]]
        (name,) = {each["cell"]["notebook"] for each in bodies}
        assert server.asked[-1][0] == f"/notebooks/{name}"

    asyncio.run(asyncio.wait_for(run(), 60))


def start(key_file: Path, *answers: web.Response, **options: object) -> None:
    """What a run does before anything begins."""

    async def run() -> None:
        async with Server(*answers) as url:
            await asyncio.to_thread(make_tool, RemoteTool(url=url, key_file=str(key_file), **options))

    asyncio.run(asyncio.wait_for(run(), 60))


STATUS = web.json_response({"timeout_s": 60.0, "memory_mb": 1024, "refused": list(CASES)})
LESS = web.json_response({"timeout_s": 60.0, "memory_mb": 1024, "refused": [each for each in CASES if each != "forks"]})


def test_a_sandbox_is_tried_before_a_run_begins(key_file: Path) -> None:
    start(key_file, STATUS, said("42"))


@pytest.mark.parametrize(
    ("answers", "options", "words"),
    [
        ([web.Response(status=401, text="no key, or a wrong one")], {}, "cannot be used: 401: no key, or a wrong one"),
        ([web.Response(status=502)], {}, "cannot be used: 502"),
        ([web.Response(text="welcome")], {}, "cannot be used: 200, but"),
        ([STATUS, said("42")], {"timeout_s": 61}, "timeout_s=61: the sandbox at .* gives at most 60"),
        ([STATUS, said("42")], {"memory_mb": 2048}, "memory_mb=2048: the sandbox at .* gives at most 1024"),
        ([LESS, said("42")], {}, "was not tried against forks"),
        ([STATUS, said("41")], {}, r"said .*41.* to `print\(6 \* 7\)`"),
    ],
)
def test_a_sandbox_that_cannot_be_used_ends_the_command_before_it_begins(
    key_file: Path, answers: list[web.Response], options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        start(key_file, *answers, **options)
    assert caught.value.exit_code == 2
    assert KEY not in str(caught.value)


def test_nobody_listens(key_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:1 cannot be used"):
        make_tool(RemoteTool(url="http://127.0.0.1:1", key_file=str(key_file)))


@pytest.mark.parametrize("content", ["", "short", "with a space in the middle", "é" * 20])
def test_a_file_without_a_key_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"rollout\.tool\.key_file: .* holds no key.*openssl rand") as caught:
        read_key(path, "rollout.tool.key_file")
    assert not content or content not in str(caught.value)
    with pytest.raises(ConfigError, match=r"rollout\.tool\.key_file: .*absent"):
        RemotePython(RemoteTool(url="http://x", key_file=str(tmp_path / "absent")))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("10.0.0.7:8300", "no address of a sandbox"),
        ("ftp://host", "no address"),
        ("http://user:secret@host", "belongs in key_file"),
        ("http://host?key=secret", "belongs in key_file"),
    ],
)
def test_an_address_is_an_address_and_nothing_else(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RemoteTool(url=url, key_file="key")


def test_where_programs_run_does_not_change_what_was_sampled(tmp_path: Path) -> None:
    def of(*words: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text("name: x\nrun_dir: x\nmodel: {path: x}\ndata: {train: x}\n")
        return recipe(load_config(path, list(words)))

    there = "rollout.tool={type: remote, url: http://a, key_file: k}"
    assert of(there) == of(there, "rollout.tool.url=http://b", "rollout.tool.key_file=l", "rollout.tool.retries=1")
    assert of() == of("rollout.tool.concurrency=3")
    assert len({of(there), of(), of(there, "rollout.tool.memory_mb=9"), of("rollout.tool={type: notebook}")}) == 4
