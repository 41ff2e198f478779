"""The escape test: all is refused here, and each case is named where the sandbox is weakened in just that respect."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ctpo_megatron.config.tools import PythonTool
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.rollout.sandbox import CASES, command, escape, escapes, process, sandbox_available
from ctpo_megatron.rollout.sandbox.command import MAX_FILE_BYTES, Limits, interpreter_words
from ctpo_megatron.rollout.tools import make_tool

needs_sandbox = pytest.mark.skipif(sandbox_available() is not None, reason=str(sandbox_available()))
Options = list[str]
ALLOW_ALL = b"\x06\x00\x00\x00\x00\x00\xff\x7f"  # one instruction


def share(kind: str, options: Options) -> Options:
    """bubblewrap's options, with one namespace of the host."""
    at = options.index("--unshare-all")
    kinds = [f"--unshare-{each}" for each in ("user", "net", "pid", "ipc", "uts", "cgroup") if each != kind]
    return [*options[:at], *kinds, *(each for each in options[at + 1 :] if (kind, each) != ("pid", "--as-pid-1"))]


def without(words: Options, options: Options) -> Options:
    at = next(i for i in range(len(options)) if options[i : i + len(words)] == words)
    return options[:at] + options[at + len(words) :]


def with_room(options: Options) -> Options:
    return [str(16 * MAX_FILE_BYTES) if each == str(MAX_FILE_BYTES) else each for each in options]


@needs_sandbox
def test_nothing_succeeds_here() -> None:
    assert escapes(PythonTool()) == []
    assert escapes(PythonTool(memory_mb=64)) == []


def test_the_attempts_succeed_where_nothing_confines(tmp_path: Path) -> None:
    """So each of them can: by Python alone, as this user, in a directory of its own."""
    memory, size = 8 << 20, 1 << 20
    descriptor = os.open(os.devnull, os.O_RDONLY)
    try:
        with escape._host() as given:
            given |= {"memory_bytes": memory, "file_bytes": size, "prefix": str(tmp_path)}
            program = f"{escape._probes()}\nattempt(**{given!r})"
            done = subprocess.run(
                interpreter_words("-c", program), cwd=tmp_path, capture_output=True, timeout=60, check=True, pass_fds=[descriptor]
            )
    finally:
        os.close(descriptor)
    found = json.loads(done.stdout.partition(b"\n")[0])
    assert [case for case, what in found.items() if what] == [case for case in CASES if case != "output"]
    assert len(found["network"]) >= 3
    assert {"a process forked", "a thread begun"} == set(found["forks"])
    assert any("read" in what for what in found["files"])
    assert any("inherited" in what for what in found["files"])
    assert (len(done.stdout), len(done.stderr)) == (2 * size + len(done.stdout.partition(b"\n")[0]) + 1, 2 * size)
    assert list(tmp_path.iterdir()) == []


@needs_sandbox
@pytest.mark.parametrize(
    ("weaken", "case", "what"),
    [
        (lambda options: share("net", options), "network", "a connection to"),
        (lambda options: share("pid", options), "processes", "other processes"),
        (lambda options: without(["--clearenv"], options), "environment", "variables, such as"),
        (lambda options: without(["--remount-ro", "/"], options), "files", "a file made in /"),
        (
            lambda options: ["--ro-bind", "/tmp", "/tmp", *without(["--size", str(MAX_FILE_BYTES), "--tmpfs", "/tmp"], options)],
            "files",
            "read",
        ),
        (with_room, "disk", "bytes written in several"),
    ],
)
def test_a_sandbox_with_one_option_less_is_named(
    monkeypatch: pytest.MonkeyPatch, weaken: Callable[[Options], Options], case: str, what: str
) -> None:
    whole = command.sandbox_options
    monkeypatch.setattr(process, "sandbox_options", lambda *descriptors: weaken(whole(*descriptors)))
    (found, *_) = [each for each in escapes(PythonTool()) if each.case == case]
    assert what in str(found)
    with pytest.raises(ConfigError, match=rf"rollout\.tool: the sandbox does not hold .*{case} \(") as refused:
        make_tool(PythonTool(fallback="calculator"))
    assert refused.value.exit_code == 2


@needs_sandbox
def test_a_sandbox_without_its_filter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "system_call_filter", lambda: ALLOW_ALL)
    assert [str(each) for each in escapes(PythonTool())] == ["forks (a process forked)", "forks (a thread begun)"]


@needs_sandbox
def test_a_sandbox_without_its_limits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "impose", lambda self, pid: None)
    assert {each.case for each in escapes(PythonTool())} == {"memory", "output", "time"}


@needs_sandbox
def test_a_sandbox_that_does_not_end_programs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(escape, "ENDLESS", "import time; time.sleep(0.5)")
    ended = process.ConfinedProcess.ended
    monkeypatch.setattr(process.ConfinedProcess, "ended", lambda self, _timeout_s: ended(self, 60.0))
    assert [str(each) for each in escapes(PythonTool())] == ["time (a program was not ended after 0.1 s)"]


@needs_sandbox
def test_what_cannot_be_tried_counts_as_possible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = escapes(PythonTool(memory_mb=1))  # too little for an interpreter
    assert {each.case for each in found} == set(CASES)
    assert "not tried" in str(found[0])
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: not today' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = escapes(PythonTool())
    assert {each.case for each in found} == set(CASES)
    assert any("bwrap: not today" in str(each) for each in found)


@needs_sandbox
def test_it_can_be_made_where_an_event_loop_runs() -> None:
    async def within() -> object:
        return make_tool(PythonTool())

    assert asyncio.run(within()) is not None
