"""The sandbox, attacked: every program here is run for real."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from leftovers import living, processes

from ctpo_megatron.config.tools import CalculatorTool, PythonTool
from ctpo_megatron.errors import ConfigError, RolloutError
from ctpo_megatron.rollout import sandbox
from ctpo_megatron.rollout.calculator import Calculator
from ctpo_megatron.rollout.protocols import ToolResult
from ctpo_megatron.rollout.sandbox import BubblewrapPython, process, sandbox_available
from ctpo_megatron.rollout.sandbox.command import Limits, interpreter_words
from ctpo_megatron.rollout.sandbox.seccomp import filter_program
from ctpo_megatron.rollout.tools import extract_code, make_tool

needs_sandbox = pytest.mark.skipif(sandbox_available() is not None, reason=str(sandbox_available()))


def run(code: str, **options: object) -> ToolResult:
    return asyncio.run(BubblewrapPython(PythonTool(**options)).run(code))


def sandboxes() -> set[int]:
    """bubblewrap's processes and the programs in them, of calls with memory_mb=MEMORY_MB."""
    found = set()
    limit = str(MEMORY_MB * sandbox.MIB)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = f"{(entry / 'cmdline').read_text()} {(entry / 'limits').read_text()}"
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if limit in words and state != "Z":
                found.add(int(entry.name))
    return found


MEMORY_MB = 600 + os.getpid() % 400  # a limit of its own tells the calls of this test process from those of others


@needs_sandbox
def test_prints_as_python_does():
    assert run("print(123*456)").output == "56088"
    assert run("x = 3\nx").output == ""
    assert run("print('é', 'ß'.upper())").output == "é SS"
    assert run("import math, fractions\nprint(math.comb(10, 3), fractions.Fraction(3, 6))").output == "120 1/2"


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print('so far')\n1/0", "so far\nZeroDivisionError: division by zero"),
        ("x =", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(4)", "SystemExit: 4"),
        ("import sys; sys.exit('no')", "no"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("import ctypes; ctypes.string_at(0)", "Killed: SIGSEGV"),
        ("\0", "SyntaxError: source code cannot contain null bytes"),
    ],
)
def test_a_failure_ends_with_its_last_line(code, output):
    result = run(code)
    assert not result.ok
    assert result.output == output


@needs_sandbox
def test_no_network(tmp_path):
    code = "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nprint('connected')"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        result = run(code.format(port=server.getsockname()[1]))
    assert not result.ok
    assert "connected" not in result.output
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        result = run(f"import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({str(tmp_path / 's')!r})\nprint('connected')")
    assert not result.ok
    assert "FileNotFoundError" in result.output


@needs_sandbox
def test_sees_no_files_of_users_and_no_environment(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("s3cret")
    monkeypatch.setenv("SECRET", "s3cret")
    for path in (tmp_path / "secret", Path(__file__), Path.home() / ".bashrc", "/etc/passwd"):
        result = run(f"print(open({str(path)!r}).read())")
        assert not result.ok, path
        assert "FileNotFoundError" in result.output
    result = run("import os\nprint(sorted(os.environ), os.getuid())", max_output_chars=1000)
    assert result.output == "['LC_CTYPE', 'PWD'] 65534"
    roots = {"bin", "dev", "etc", "lib", "lib64", "proc", "tmp", "usr", Path(os.path.realpath(sys.base_prefix)).parts[1]}
    assert set(run("import os\nprint(*os.listdir('/'))").output.split()) <= roots


@needs_sandbox
@pytest.mark.parametrize(
    "path", ["/x", "/usr/x", "/dev/x", "/dev/shm/x", "/etc/x", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname",
             "/proc/self/oom_score_adj", f"{os.path.realpath(sys.base_prefix)}/x"]
)  # fmt: skip
def test_writes_nowhere_but_tmp(path):
    flags = "os.O_WRONLY" if path.startswith("/proc") else "os.O_WRONLY | os.O_CREAT"
    result = run(f"import os\nos.open({path!r}, {flags})\nprint('opened')")
    assert not result.ok
    assert "Read-only file system" in result.output


@needs_sandbox
def test_tmp_is_private_and_small():
    assert run("open('/tmp/x', 'w').write('1')\nprint(open('/tmp/x').read())").output == "1"
    assert run("import os\nprint(os.listdir('/tmp'))").output == "[]"
    fill = "for i in range(64):\n    open(f'/tmp/{i}', 'w').write('x' * 1_000_000)"
    result = run(fill)
    assert not result.ok
    assert "No space left on device" in result.output


@needs_sandbox
@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo hello'])",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import threading\nthreading.Thread(target=print).start()",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import os\nos.memfd_create('x')",
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.unshare(0x10000000) == 0, 'not permitted'",
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.ptrace(0, 0, 0, 0) == 0, 'not permitted'",
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.shmget(0, 4096, 0o1600) >= 0, 'not permitted'",
    ],
)
def test_system_calls_for_processes_and_the_kernel_are_refused(code):
    result = run(code)
    assert not result.ok
    assert "not permitted" in result.output or "can't start new thread" in result.output


@needs_sandbox
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the second numbering of calls exists on x86_64 only")
def test_the_second_numbering_of_system_calls_is_refused():
    """Number 0x40000000 + 57 is fork once more; without the filter's second rule it would get past the list."""
    fork = "libc.syscall(0x40000000 + 57)"
    result = run(f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint({fork}, ctypes.get_errno())")
    assert result.output == "-1 1"


@needs_sandbox
def test_memory_is_bounded():
    result = run("x = bytearray(300 << 20)\nprint(len(x))", memory_mb=200)
    assert not result.ok
    assert result.output == "MemoryError"
    assert run("x = bytearray(100 << 20)\nprint(len(x))", memory_mb=200).output == str(100 << 20)


@needs_sandbox
def test_huge_output_is_cut_where_it_is_written():
    begun = time.monotonic()
    result = run("while True: print('x' * 9999)", max_output_chars=200)
    assert time.monotonic() - begun < 5
    assert not result.ok
    assert len(result.output) <= 200
    assert "characters cut" in result.output
    assert result.output.endswith("File too large")
    assert len(run("import sys\nwhile True: sys.stderr.write('x' * 9999)").output) <= 256


@needs_sandbox
@pytest.mark.parametrize(
    "code",
    ["while True: pass", "import time\ntime.sleep(99)", "import signal, time\nsignal.signal(15, lambda *a: 0)\ntime.sleep(99)",
     "import os, time\nfor fd in range(3): os.close(fd)\ntime.sleep(99)", "10 ** 10 ** 9"],
)  # fmt: skip
def test_an_endless_program_is_ended_in_time_and_leaves_nothing(code):
    begun = time.monotonic()
    result = run(code, timeout_s=0.5, memory_mb=MEMORY_MB)
    assert time.monotonic() - begun < 4
    assert result.output == "TimeoutError: no end within 0.5 s"
    assert not result.ok
    assert_nothing_left()


def assert_nothing_left() -> None:
    deadline = time.monotonic() + 5  # the kernel takes a moment to clear a killed namespace
    while (left := sandboxes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == set()


@needs_sandbox
def test_a_cancelled_call_ends_at_once_and_leaves_nothing():
    """Cancelled at many moments of its life, since starting a process is where asyncio's own way hangs."""

    async def cancel_after(delay: float) -> None:
        tool = BubblewrapPython(PythonTool(memory_mb=MEMORY_MB), concurrency=2)
        tasks = [asyncio.ensure_future(tool.run("import time; time.sleep(30)")) for _ in range(4)]
        await asyncio.sleep(delay)
        assert delay == 0 or sandboxes()
        for task in tasks:
            task.cancel()
        done, pending = await asyncio.wait(tasks, timeout=5)
        assert not pending
        assert all(task.cancelled() for task in done)

    for delay in (0, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.1):
        asyncio.run(cancel_after(delay))
    assert_nothing_left()


@needs_sandbox
@pytest.mark.parametrize("each_time", [False, True])
def test_a_program_whose_bubblewrap_is_killed_runs_again(each_time: bool):
    """What is seen may be the rest of one that was killed before, so all are killed for as long as there are attempts.

    A program that is to be killed each time would take so long that it never ends before it is seen, on however slow a host.
    """
    seconds = 15.0 if each_time else 0.5

    async def run_and_kill() -> ToolResult:
        tool = BubblewrapPython(PythonTool(memory_mb=MEMORY_MB, timeout_s=20.0))
        task = asyncio.ensure_future(tool.run(f"import time; time.sleep({seconds}); print(6 * 7)"))
        killed = False
        while not task.done() and (each_time or not killed):
            for pid in sandboxes():
                with contextlib.suppress(ProcessLookupError):  # one ends with the other
                    os.kill(pid, signal.SIGKILL)
                    killed = True
            await asyncio.sleep(0.005)
        assert killed
        return await task

    if each_time:
        with pytest.raises(RolloutError, match=f"killed by signal 9 in each of {sandbox.ATTEMPTS} attempts"):
            asyncio.run(run_and_kill())
    else:
        result = asyncio.run(run_and_kill())
        assert (result.ok, result.output) == (True, "42")
    assert_nothing_left()


@needs_sandbox
def test_a_bubblewrap_that_is_killed_as_it_starts_leaves_no_child(monkeypatch, tmp_path):
    """A stand-in that dies in the moment when it has a child and has not set it up: too short to meet with the real one."""
    fake, pids = tmp_path / "bwrap", tmp_path / "pids"
    fake.write_text(f"#!/bin/sh\nsleep 600 &\necho $! >> {pids}\nkill -KILL $$\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RolloutError, match="killed by signal 9"):
        run("print(1)")
    children = [int(pid) for pid in pids.read_text().split()]
    assert len(children) == sandbox.ATTEMPTS
    assert living(processes(children)) == []


@needs_sandbox
def test_programs_die_with_the_process_that_runs_them():
    program = (
        "import asyncio\nfrom ctpo_megatron.config.tools import PythonTool\nfrom ctpo_megatron.rollout.sandbox import *\n"
        f"asyncio.run(BubblewrapPython(PythonTool(memory_mb={MEMORY_MB}, timeout_s=60)).run('while True: pass'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 20
        while len(sandboxes()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        assert len(sandboxes()) == 2  # bubblewrap and the program
    finally:
        parent.kill()
        parent.wait()
    assert_nothing_left()


@needs_sandbox
def test_programs_die_with_the_thread_that_started_them():
    """What `--die-with-parent` does in bubblewrap 0.8, and why the thread of the event loop starts programs."""
    begun = []

    def begin() -> None:
        with process.memory_file() as stdin, process.memory_file() as said:
            stdin.write(b"import time; print('begun', flush=True); time.sleep(60)")
            stdin.seek(0)
            words = interpreter_words("-")
            begun.append(process.ConfinedProcess(words, Limits(MEMORY_MB, 9), stdin=stdin, stdout=said, stderr=said))
            while os.fstat(said.fileno()).st_size == 0:  # before that bubblewrap's child may not have asked to die with it yet
                time.sleep(0.005)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert asyncio.run(begun[0].ended(20.0))
    assert begun[0].collect()[1] == signal.SIGKILL
    assert_nothing_left()


@needs_sandbox
def test_calls_do_not_meet():
    async def many() -> list[ToolResult]:
        tool = BubblewrapPython(PythonTool())
        return await asyncio.gather(*(tool.run(f"import os\nprint({i}**2, os.listdir('/tmp'), len(os.listdir('/proc/1/fd')) > 0)")
                                      for i in range(24)))  # fmt: skip

    results = asyncio.run(many())
    assert [r.output for r in results] == [f"{i**2} [] True" for i in range(24)]


def test_the_filter_is_for_known_machines_only():
    assert len(filter_program("x86_64")) % 8 == 0
    assert len(filter_program("aarch64")) % 8 == 0
    assert filter_program("riscv64") is None


@pytest.fixture
def without_bubblewrap(monkeypatch, tmp_path):
    """A PATH without bwrap."""
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox_available.cache_clear()
    yield
    sandbox_available.cache_clear()


@pytest.mark.usefixtures("without_bubblewrap")
def test_without_bubblewrap_the_fallback_decides(caplog):
    assert "not installed" in sandbox_available()
    with pytest.raises(ConfigError, match=r"rollout\.tool\.fallback=calculator"):
        make_tool(PythonTool())
    with caplog.at_level(logging.WARNING):
        assert isinstance(make_tool(PythonTool(fallback="calculator")), Calculator)
    assert len(caplog.records) == 1
    assert "calculator" in caplog.text


@needs_sandbox
def test_a_bubblewrap_that_is_forbidden_to_work_is_found_out(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sandbox_available.cache_clear()
    try:
        assert "No permissions to create a new namespace" in sandbox_available()
        with pytest.raises(Exception, match="bubblewrap failed to run a program: bwrap: No permissions"):
            run("print(1)")
    finally:
        monkeypatch.undo()
        sandbox_available.cache_clear()


def test_the_configured_tool_is_made():
    assert make_tool(None) is None
    assert isinstance(make_tool(CalculatorTool()), Calculator)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("a\n```python\nx\n```\nb\n```python\ny\nz\n```\nc", "y\nz\n"),
        ("```python\nx\n```\nso \\boxed{1}", None),
        ("\\boxed{1}\n```python\nx\n```", "x\n"),
        ("```python\nprint(1)\n", None),
        ("```python\nx\n```\n```python\nopen", "x\n"),
        ("```\nx\n```", None),
        ("no code", None),
        ("```python\r\nx\r\n```", "x\r\n"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
    ],
)
def test_the_last_closed_block_is_the_code(text, code):
    assert extract_code(text) == code
