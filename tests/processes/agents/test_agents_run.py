"""Agents as processes: what they get, what becomes of those that fail, hang, or flood, and that none is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from ctpo_megatron.agents.play.command import CommandRunner, check_command
from ctpo_megatron.agents.play.functions import FunctionRunner, check_function
from ctpo_megatron.agents.play.logs import AgentLogs
from ctpo_megatron.agents.play.runner import AgentFailed, AgentRunner, Answer
from ctpo_megatron.agents.play.task import AgentTask
from ctpo_megatron.config.agents import CommandAgent, FunctionAgent
from ctpo_megatron.errors import ConfigError
from tests.support.patience import eventually

FUNCTIONS = "tests.support.agent_functions"
LIMIT_S = 60.0
SECRET = "CTPO_TEST_SECRET"


def task(question: str = "6 * 7?", attempt: str = "g00000001.2") -> AgentTask:
    return AgentTask(
        "http://127.0.0.1:9/a/v1",
        "http://127.0.0.1:9/a",
        "sk-key",
        "policy",
        [{"role": "user", "content": question}],
        attempt,
        LIMIT_S,
    )


def shell(script: str, **settings: object) -> CommandAgent:
    return CommandAgent(command=("/bin/sh", "-c", script), **settings)


async def played(runner: AgentRunner, *tasks: AgentTask) -> list[object]:
    async with asyncio.timeout(LIMIT_S):
        said = await asyncio.gather(*(runner.play(each) for each in tasks or [task()]), return_exceptions=True)
        return [each.text if isinstance(each, Answer) and each.reward is None else each for each in said]


def run_command(config: CommandAgent, logs: Path) -> object:
    async def once() -> object:
        return (await played(CommandRunner(config, AgentLogs(logs))))[0]

    return asyncio.run(once())


def test_a_command_gets_its_task_and_nothing_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "of the run")
    script = f'cat; cat "$1"; pwd; ls -A; echo "$OPENAI_BASE_URL $OPENAI_API_KEY $ANTHROPIC_BASE_URL $MINE [${SECRET}]"'
    config = CommandAgent(command=("/bin/sh", "-c", script, "sh", "{task}"), answer="stdout", env={"MINE": "mine"})
    said = str(run_command(config, tmp_path))
    given, directory, variables = said[: said.index("}{") + 1], said.splitlines()[-2], said.splitlines()[-1]
    assert said.startswith(given * 2)
    assert AgentTask(**json.loads(given)) == task()
    assert not Path(directory).exists()
    assert variables == "http://127.0.0.1:9/a/v1 sk-key http://127.0.0.1:9/a mine []"
    passed = shell(f"echo ${SECRET}", answer="stdout", pass_env=(SECRET,))
    assert run_command(passed, tmp_path) == "of the run\n"


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    failed = run_command(shell("echo no such tool >&2; exit 3"), tmp_path)
    assert isinstance(failed, AgentFailed)
    assert "exit code 3" in str(failed)
    assert "no such tool" in str(failed)
    assert (tmp_path / "g00000001.2.log").read_text() == "no such tool\n"
    assert "signal 9" in str(run_command(shell("kill -9 $$"), tmp_path))
    assert run_command(shell("true"), tmp_path) is None
    assert "cannot be started" in str(run_command(CommandAgent(command=("true",), cwd=str(tmp_path / "none")), tmp_path))


def test_what_a_command_floods_is_bounded(tmp_path: Path) -> None:
    said = run_command(shell("head -c 3000000 /dev/zero | tr '\\0' x; echo answer >&2", log_kb=1, answer="stdout"), tmp_path)
    assert len(str(said)) < 70_000
    assert (tmp_path / "g00000001.2.log").read_text() == "answer\n"
    run_command(shell("head -c 3000000 /dev/zero | tr '\\0' x", log_kb=1), tmp_path / "more")
    assert (tmp_path / "more" / "g00000001.2.log").stat().st_size < 1100


def test_a_command_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    async def cancelled() -> None:
        config = shell(f"sleep 600 & echo $! $$ >{pids}.new; mv {pids}.new {pids}; trap '' TERM; wait")
        play = asyncio.create_task(CommandRunner(config, AgentLogs(tmp_path)).play(task()))
        await wait_for(pids)
        play.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await play

    asyncio.run(cancelled())
    gone([int(each) for each in pids.read_text().split()])


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    assert run_command(shell(f"sleep 600 & echo $! >{tmp_path}/pids"), tmp_path) is None
    gone([int((tmp_path / "pids").read_text())])


def test_agents_end_with_the_run_however_it_ends(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    source = f"""
import asyncio
from pathlib import Path
from tests.processes.agents.test_agents_run import *
config = shell("sleep 600 & echo $! $$ >{pids}.new; mv {pids}.new {pids}; wait")
asyncio.run(CommandRunner(config, AgentLogs(Path("{tmp_path}"))).play(task()))
"""
    run = subprocess.Popen([sys.executable, "-c", source], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        asyncio.run(wait_for(pids))
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    gone([int(each) for each in pids.read_text().split()])


@asynccontextmanager
async def functions(name: str, logs: Path, **settings: object) -> AsyncIterator[FunctionRunner]:
    runner = FunctionRunner(FunctionAgent(path=f"{FUNCTIONS}:{name}", **{"workers": 1, **settings}), AgentLogs(logs))
    try:
        yield runner
    finally:
        await runner.close()


def test_functions_share_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "of the run")

    async def several() -> None:
        async with functions("echo", tmp_path) as runner:
            said = await played(runner, *(task(f"q{n}", f"a{n}") for n in range(20)))
            assert [str(each).rsplit(" ", 1)[0] for each in said] == [f"a{n} q{n}" for n in range(20)]
            pids = {str(each).rsplit(" ", 1)[1] for each in said}
            assert len(pids) == 1
        gone([int(each) for each in pids])
        async with functions("sync", tmp_path) as runner:
            assert await played(runner) == [None]
        async with functions("Counts", tmp_path, options={"of": {"reward": 2}}) as runner:
            assert await played(runner, task("q"), task("r")) == [Answer("q", 2.0), Answer("r", 4.0)]
        async with functions("secrets", tmp_path) as runner:
            names = str((await played(runner))[0]).split()
            assert SECRET not in names
            assert "PATH" in names

    asyncio.run(several())


def test_functions_that_fail(tmp_path: Path) -> None:
    async def several() -> None:
        for name, words in (("raises", "ValueError: no 6 * 7?"), ("number", "returned a int"), ("dies", "ended by itself")):
            async with functions(name, tmp_path) as runner:
                for _ in range(2):  # a process that died is followed by another one
                    (failed,) = await played(runner)
                    assert isinstance(failed, AgentFailed), failed
                    assert words in str(failed)
        assert "in raises" in (tmp_path / "g00000001.2.log").read_text()
        async with functions("noisy", tmp_path, log_kb=1) as runner:
            assert await played(runner) == ["done"]
        assert (tmp_path / "worker-0.log").stat().st_size < 1100

    asyncio.run(several())


def test_functions_that_are_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancel(runner: FunctionRunner, of: AgentTask, others: int = 0) -> list[object]:
        more = [asyncio.create_task(runner.play(of)) for _ in range(others)]
        play = asyncio.create_task(runner.play(of))
        await asyncio.sleep(0)
        async with asyncio.timeout(LIMIT_S):
            while not runner._workers[0].busy or not runner._workers[0]._starting.done():
                await asyncio.sleep(0.01)
            play.cancel()
            assert isinstance((await asyncio.gather(play, return_exceptions=True))[0], asyncio.CancelledError)
            return await asyncio.gather(*more, return_exceptions=True)

    async def several() -> None:
        monkeypatch.setattr("ctpo_megatron.agents.play.functions.CANCEL_TIMEOUT_S", LIMIT_S)  # on a busy host, too
        async with functions("waits", tmp_path) as runner:
            await cancel(runner, task())
            process = runner._workers[0]._starting.result()
            assert not process.ended  # it ended when it was told to
        monkeypatch.setattr("ctpo_megatron.agents.play.functions.CANCEL_TIMEOUT_S", 0.1)
        async with functions("hangs", tmp_path) as runner:
            before = await played(runner)
            (other,) = await cancel(runner, task("hang"), others=1)
            assert isinstance(other, AgentFailed)
            assert "did not end" in str(other)
            gone([int(str(before[0]))])
            after = await played(runner)
            assert after != before

    asyncio.run(several())


def test_what_cannot_be_run_is_refused_before_the_start(tmp_path: Path) -> None:
    for name, words in (("no_function", "needed: a function"), ("none", "no attribute 'none'")):
        with pytest.raises(ConfigError, match=words):
            check_function(FunctionAgent(path=f"{FUNCTIONS}:{name}"))
    check_function(FunctionAgent(path=f"{FUNCTIONS}:echo"))
    check_command(CommandAgent(command=("sh",)))
    for config, words in (
        (CommandAgent(command=("no-such-program",)), "no program 'no-such-program'"),
        (CommandAgent(command=("/etc/passwd",)), "no program"),
        (CommandAgent(command=("sh",), cwd=str(tmp_path / "none")), "is no directory"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_command(config)


async def wait_for(path: Path) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not path.exists():
            await asyncio.sleep(0.01)


def gone(pids: list[int]) -> None:
    assert pids
    assert eventually(lambda: not any(map(alive, pids)), LIMIT_S)


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
