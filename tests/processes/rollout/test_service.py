"""The sandbox over HTTP: real programs, confined, for those who have the key; and the command that serves them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from ctpo_megatron.config.tools import NotebookTool, PythonTool, RemoteTool
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.serve_sandbox import serve
from ctpo_megatron.rollout.protocols import PastCall, ToolResult
from ctpo_megatron.rollout.sandbox import MIB, BubblewrapPython, Notebooks, sandbox_available, service
from ctpo_megatron.rollout.sandbox import shelf as shelf_module
from ctpo_megatron.rollout.sandbox.key import header
from ctpo_megatron.rollout.sandbox.remote import Cell, RemotePython
from ctpo_megatron.rollout.sandbox.service import Most, Service
from ctpo_megatron.rollout.sandbox.shelf import NoRoomForNotebook, Shelf, UnknownNotebook
from ctpo_megatron.rollout.tools import make_tool

pytestmark = pytest.mark.skipif(sandbox_available() is not None, reason=str(sandbox_available()))
KEY = "0123456789abcdef-secret"
MOST = Most(timeout_s=20.0, memory_mb=1024, at_a_time=4)
MEMORY_MB = 600 + os.getpid() % 400  # tells the programs of this test process from those of others
WHOLE = {"code": "print(6 * 7)", "timeout_s": 9.0, "memory_mb": 256, "max_output_chars": 99}


@asynccontextmanager
async def serving(most: Most = MOST, port: int = 0) -> AsyncIterator[str]:
    runner = Service(most, KEY).runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY)
    return path


def programs() -> list[int]:
    """Confined processes of this test process's programs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and str(MEMORY_MB * MIB) in (entry / "limits").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


async def until_gone() -> None:
    deadline = time.monotonic() + 10
    while programs() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert programs() == []


def test_programs_say_there_what_they_say_here(key_file: Path) -> None:
    codes = [
        "print('é', 1)",
        "print('so far')\n1/0",
        "x =",
        "while True: print('x' * 99)",
        "import os; os.fork()",
        "raise SystemExit(4)",
    ]

    async def both() -> list[tuple[ToolResult, ToolResult]]:
        async with serving() as url:
            there, here = RemotePython(RemoteTool(url=url, key_file=str(key_file))), BubblewrapPython(PythonTool())
            return [(await there.run(code), await here.run(code)) for code in codes]

    for there, here in asyncio.run(both()):
        assert (there.output, there.ok) == (here.output, here.ok)


def answers(*requests: tuple[str, str, dict[str, object]], most: Most = MOST) -> list[tuple[int, str]]:
    """(status, body) of the answers to requests, each with what aiohttp's client takes."""

    async def ask() -> list[tuple[int, str]]:
        found = []
        async with serving(most) as url, aiohttp.ClientSession() as http:
            for method, path, options in requests:
                async with http.request(method, f"{url}{path}", **options) as answer:
                    found.append((answer.status, await answer.text()))
        return found

    return asyncio.run(asyncio.wait_for(ask(), 120))


def test_without_the_key_nothing_is_read_and_nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_request: web.Request) -> bytes:
        raise AssertionError("a body was read")

    monkeypatch.setattr(web.Request, "read", never)
    keys: list[dict[str, str]] = [
        {},
        header("wrong"),
        header(KEY[:-1]),
        header(f"{KEY}x"),
        {"Authorization": KEY},
        header("é" * 9),
    ]
    places = [("POST", "/run"), ("GET", "/status"), ("GET", "/elsewhere")]
    found = answers(*((method, path, {"headers": key, "json": WHOLE}) for key in keys for method, path in places))
    assert {status for status, _ in found} == {401}
    assert len({body for _, body in found}) == 1


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"json": WHOLE}, 200, '"42"'),
        ({"json": WHOLE | {"timeout_s": 20.5}}, 400, "timeout_s=20.5; allowed: above 0, at most 20"),
        ({"json": WHOLE | {"timeout_s": 0}}, 400, "timeout_s=0; allowed"),
        ({"json": WHOLE | {"memory_mb": 4096}}, 400, "memory_mb=4096; allowed: above 0, at most 1024"),
        ({"json": WHOLE | {"max_output_chars": 10**9}}, 400, "max_output_chars"),
        ({"json": WHOLE | {"more": 1}}, 400, "unknown field"),
        ({"json": WHOLE | {"code": 7}}, 400, "Expected `str`"),
        ({"data": b"{"}, 400, "the body is no program"),
        ({"data": b"\xff\xfe"}, 400, "the body is no program"),
        ({"data": b" " * (service.MAX_BODY_BYTES + 1)}, 413, ""),
    ],
)
def test_a_body_is_a_program_within_bounds(body: dict[str, object], status: int, words: str) -> None:
    found, told = answers(("POST", "/run", {"headers": header(KEY), **body}))[0]
    assert found == status
    assert words in told


def test_a_body_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "BODY_TIMEOUT_S", 0.1)

    async def trickle() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    status, _ = answers(("POST", "/run", {"headers": header(KEY), "data": trickle()}))[0]
    assert status == 408


def test_more_programs_than_may_wait_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LONGEST_QUEUE", 1)

    async def ask() -> list[int]:
        async with serving(Most(20.0, 1024, 1)) as url, aiohttp.ClientSession(headers=header(KEY)) as http:

            async def one() -> int:
                async with http.post(f"{url}/run", json=WHOLE | {"code": "import time; time.sleep(1)"}) as answer:
                    return answer.status

            return await asyncio.gather(*(one() for _ in range(5)))

    assert sorted(asyncio.run(ask())) == [200, 200, 503, 503, 503]


def test_bubblewrap_that_fails_is_no_answer_of_a_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: not today' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status, told = answers(("POST", "/run", {"headers": header(KEY), "json": WHOLE}))[0]
    assert status == 500
    assert "bwrap: not today" in told


def test_a_program_ends_when_nobody_waits_for_it(key_file: Path) -> None:
    async def leave() -> None:
        async with serving() as url:
            tool = RemotePython(RemoteTool(url=url, key_file=str(key_file), memory_mb=MEMORY_MB, timeout_s=20.0))
            running = asyncio.ensure_future(tool.run("while True: pass"))
            while not programs():
                await asyncio.sleep(0.01)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await until_gone()

    asyncio.run(asyncio.wait_for(leave(), 60))


def test_what_serves_programs_is_checked_before_it_listens(key_file: Path, tmp_path: Path) -> None:
    def begun(path: Path = key_file, port: int = 0) -> None:
        asyncio.run(asyncio.wait_for(serve(path, "127.0.0.1", port, MOST, asyncio.Event()), 60))

    with pytest.raises(ConfigError, match=r"--key-file: .*absent"):
        begun(tmp_path / "absent")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="nothing can listen at"):
        begun(port=taken.getsockname()[1])


def test_a_sandbox_that_does_not_hold_is_not_served(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ctpo_megatron.rollout.sandbox import process

    whole = process.sandbox_options
    monkeypatch.setattr(process, "sandbox_options", lambda *fds: [each for each in whole(*fds) if each != "--clearenv"])
    with pytest.raises(ConfigError, match=r"ctpo serve-sandbox: the sandbox does not hold .* environment \("):
        asyncio.run(serve(key_file, "127.0.0.1", 0, MOST, asyncio.Event()))


def test_the_command_serves_the_loopback_until_a_signal(key_file: Path) -> None:
    words = [sys.executable, "-m", "ctpo_megatron.cli", "serve-sandbox", "--key-file", str(key_file), "--port", "0"]
    command = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert command.stdout is not None
        first = command.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", first)
        assert url, first
        assert "it held against network, processes" in first
        tool = make_tool(RemoteTool(url=url[0], key_file=str(key_file)))
        assert tool is not None
        assert asyncio.run(tool.run("print(6 * 7)")).output == "42"
        assert KEY not in Path(f"/proc/{command.pid}/cmdline").read_text()
        command.send_signal(signal.SIGTERM)
        out, err = command.communicate(timeout=60)
    finally:
        command.kill()
        command.wait()
    assert (command.returncode, out, err) == (128 + signal.SIGTERM, "", "")


def test_a_notebook_there_is_what_it_is_here(key_file: Path) -> None:
    codes = ["x = 3", "x * 14", "print('so far')\n1/0", "x", "import os; os._exit(1)", "x", "y = 1\ny"]

    async def there() -> list[str]:
        async with serving() as url:
            tool = RemotePython(RemoteTool(url=url, key_file=str(key_file), notebook=True, memory_mb=MEMORY_MB))
            async with tool.session() as one, tool.session() as other:
                found = [(await one.run(each)).output for each in codes]
                assert (await other.run("y")).output == "NameError: name 'y' is not defined"
                assert programs()
            await until_gone()
            return found

    async def here() -> list[str]:
        async with Notebooks(NotebookTool()).session() as notebook:
            return [(await notebook.run(each)).output for each in codes]

    assert asyncio.run(asyncio.wait_for(there(), 60)) == asyncio.run(here())


def test_a_notebook_outlives_the_service_that_has_it(key_file: Path) -> None:
    """Its programs run again in one of the next service."""

    async def play() -> None:
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            url = await first.enter_async_context(serving())
            tool = RemotePython(RemoteTool(url=url, key_file=str(key_file), notebook=True, memory_mb=MEMORY_MB))
            async with tool.session([PastCall("x = 3", "")]) as one:
                assert (await one.run("x += 1\nx")).output == "4"
                await first.aclose()
                await until_gone()
                await second.enter_async_context(serving(port=int(url.rpartition(":")[2])))
                assert (await one.run("x")).output == "4"

    asyncio.run(asyncio.wait_for(play(), 60))


ID = "0123456789abcdef"
CONFIG = PythonTool(memory_mb=MEMORY_MB)


def on_shelf(play: Callable[[Shelf], Awaitable[None]]) -> None:
    async def run() -> None:
        shelf = Shelf(asyncio.Semaphore(4))
        await play(shelf)
        shelf.close_all()
        await until_gone()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_no_program_is_run_twice_in_a_notebook() -> None:
    async def play(shelf: Shelf) -> None:
        count = "x = globals().get('x', 0) + 1\nx"
        first = await asyncio.gather(*(shelf.run(Cell(ID, 1, []), count, CONFIG) for _ in range(3)))
        assert [each.output for each in first] == ["1"] * 3
        assert (await shelf.run(Cell(ID, 2), count, CONFIG)).output == "2"
        with pytest.raises(UnknownNotebook):  # the answer to this number is known, but it was another program's
            await shelf.run(Cell(ID, 2), "x", CONFIG)
        with pytest.raises(UnknownNotebook):  # so that notebook is gone
            await shelf.run(Cell(ID, 3), count, CONFIG)
        past = [PastCall(count, "1"), PastCall(count, "2")]
        assert (await shelf.run(Cell(ID, 3, past), count, CONFIG)).output == "3"

    on_shelf(play)


def test_a_notebook_that_nobody_uses_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "IDLE_S", 0.05)

    async def play(shelf: Shelf) -> None:
        assert (await shelf.run(Cell(ID, 1, []), "import time; time.sleep(0.3)\n'whole'", CONFIG)).ok
        await until_gone()
        with pytest.raises(UnknownNotebook):
            await shelf.run(Cell(ID, 2), "1", CONFIG)

    on_shelf(play)


def test_a_notebook_that_is_closed_while_it_runs_ends_after_its_program() -> None:
    async def play(shelf: Shelf) -> None:
        running = asyncio.ensure_future(shelf.run(Cell(ID, 1, []), "import time; time.sleep(0.3); print('whole')", CONFIG))
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(shelf.run(Cell(ID, 2), "print('late')", CONFIG))
        while len(programs()) < 2:
            await asyncio.sleep(0.01)
        shelf.close(ID)
        assert (await running).output == "whole"
        with pytest.raises(UnknownNotebook):
            await waiting
        await until_gone()

    on_shelf(play)


def test_no_more_notebooks_are_opened_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "MOST_NOTEBOOKS", 1)

    async def play(shelf: Shelf) -> None:
        await shelf.run(Cell(ID, 1, []), "1", CONFIG)
        with pytest.raises(NoRoomForNotebook):
            await shelf.run(Cell(ID[::-1], 1, []), "1", CONFIG)

    on_shelf(play)
