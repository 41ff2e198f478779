"""Servers that are forked from one process, with a stand-in for SGLang; tests/integration does it with SGLang itself."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from ctpo_megatron.engine.nursery import ForkedProcess, Nursery
from ctpo_megatron.engine.server import SGLangServer
from ctpo_megatron.errors import EngineError

WITHIN_S = 30.0


@pytest.fixture
def nursery() -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The process, and its socket, which takes connections at once."""
    with contextlib.closing(Nursery({}, "tests.support.forked_stand_in")) as nursery:
        yield nursery._process, nursery.place


def fork(place: Path, log: Path, *arguments: str, env: Mapping[str, str] = os.environ) -> ForkedProcess:
    with log.open("wb") as output:
        forked = ForkedProcess(place, list(arguments), output, env, WITHIN_S)
    forked.stdin.write(b"key\n")
    forked.stdin.flush()
    return forked


def test_a_forked_server_is_as_a_child(nursery: tuple[subprocess.Popen[bytes], Path], tmp_path: Path) -> None:
    """It has arguments, variables, standard input, log and a process group of its own, and its exit code is told."""
    _, place = nursery
    for code in (0, 7):
        forked = fork(place, tmp_path / "log", str(code), "go", env=os.environ | {"GIVEN": f"{code}"})
        assert forked.wait(WITHIN_S) == code == forked.poll()
        assert (tmp_path / "log").read_text() == f"key {code} True\n"


def test_one_that_waits_or_is_killed(nursery: tuple[subprocess.Popen[bytes], Path], tmp_path: Path) -> None:
    _, place = nursery
    waiting, killed = (fork(place, tmp_path / name, "3", "wait") for name in ("one", "other"))
    assert waiting.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(WITHIN_S) == -signal.SIGKILL
    waiting.stdin.close()
    assert waiting.wait(WITHIN_S) == 3


def test_the_end_of_the_nursery(nursery: tuple[subprocess.Popen[bytes], Path], tmp_path: Path) -> None:
    """With its standard input; it leaves no socket. Its servers go on, and their ends are told."""
    process, place = nursery
    forked = fork(place, tmp_path / "log", "3", "wait")
    process.stdin.close()
    assert process.wait(WITHIN_S) == 0
    assert not place.parent.exists()
    assert forked.poll() is None
    forked.stdin.close()
    assert forked.wait(WITHIN_S) == 3


def test_variables_that_a_fork_would_not_read_anew(nursery: tuple[subprocess.Popen[bytes], Path], tmp_path: Path) -> None:
    """The server is refused, and starts from nothing; so it does where there is no nursery any more."""
    process, place = nursery
    other = {"OMP_NUM_THREADS": "3"}
    with pytest.raises(OSError, match="gone, or refuses"):
        fork(place, tmp_path / "log", "0", "go", env={**os.environ, **other})
    for socket, env in ((place, other), (tmp_path / "nowhere", {})):
        server = SGLangServer([], url="http://127.0.0.1:1", api_key="key", log=tmp_path / "log", env=env, nursery=socket)
        assert isinstance(server._process, subprocess.Popen)
        server.stop()
    process.stdin.close()


def test_a_server_that_takes_too_long_names_the_setting(nursery: tuple[subprocess.Popen[bytes], Path], tmp_path: Path) -> None:
    _, place = nursery
    for section in ("rollout.engine", "algorithm.distillation.teachers[1].engine"):
        log = tmp_path / "log"
        server = SGLangServer(["0", "wait"], url="http://127.0.0.1:1", api_key="key", log=log, nursery=place)
        with pytest.raises(EngineError, match=f"raise {re.escape(section)}.start_timeout_s if"):
            server.wait_healthy(0.1, section)
        assert server.exit_code is not None
