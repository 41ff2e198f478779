"""Model-written Python, run once each in a confined process of its own.

bubblewrap gives new namespaces (no network, no other processes, no user's files: only /usr and the interpreter, read-only), a
small private /tmp, no capabilities and an empty environment; resource limits bound memory, CPU time and files; a system-call
filter refuses new processes; wall time is bounded from outside. A call costs about 15 ms, so none is pooled.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

from ctpo_megatron.config.tools import PythonTool
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.output import clip_middle
from ctpo_megatron.rollout.protocols import ToolResult
from ctpo_megatron.rollout.seccomp import filter_program

MIB = 1 << 20
MAX_FILE_BYTES = 4 * MIB  # each file that a program writes, its output included; also the size of /tmp
MAX_OPEN_FILES = 64
NOBODY = "65534"
PROBE_TIMEOUT_S = 30.0
ATTEMPTS = 3  # at a program whose bubblewrap is killed from outside
END_TIMEOUT_S = 5.0  # for bubblewrap to end after its program was killed


class BubblewrapPython:
    """Runs one program per call, at most `concurrency` (default: the number of CPUs) at a time."""

    def __init__(self, config: PythonTool, *, concurrency: int | None = None) -> None:
        self._config = config
        self._slots = asyncio.Semaphore(concurrency or os.cpu_count() or 1)

    async def run(self, code: str) -> ToolResult:
        """What `code` printed. Where it failed: `ok` is False and the traceback's last line comes last.

        A program whose bubblewrap was killed from outside, as by the system for want of memory, is run again. Raises RolloutError
        where bubblewrap itself could not run the program.
        """
        async with self._slots:
            begun = time.monotonic()
            for _ in range(ATTEMPTS):
                call = await _execute(code, self._config)
                if call.killed_by is None:
                    break
        ok, output = self._judge(call)
        return ToolResult(clip_middle(output, self._config.max_output_chars), ok, time.monotonic() - begun)

    def _judge(self, call: _Call) -> tuple[bool, str]:
        if call.timed_out:
            return False, _append(call.stdout, f"TimeoutError: no end within {self._config.timeout_s:g} s")
        if call.killed_by is not None:
            raise RolloutError(f"bubblewrap was killed by signal {call.killed_by} in each of {ATTEMPTS} attempts at a program")
        if call.exit_code is None:
            raise RolloutError(f"bubblewrap failed to run a program: {call.stderr.strip()}")
        if call.exit_code == 0:
            return True, call.stdout
        return False, _append(call.stdout, _last_words(call.stderr, call.exit_code))


@functools.cache
def sandbox_available() -> str | None:
    """None where programs can be confined on this host, otherwise a sentence that says why not and what to do.

    Runs a trivial program, since bubblewrap may be installed and still be forbidden to make namespaces.
    """
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (no `bwrap` on PATH); install the package `bubblewrap`."
    if shutil.which("prlimit") is None:
        return "`prlimit` is not on PATH; install the package `util-linux`."
    if filter_program() is None:
        return f"the sandbox has no system-call filter for {os.uname().machine}; x86_64 and aarch64 have one."
    if not os.path.exists(_interpreter()):
        return f"there is no Python at {_interpreter()} to run programs with."
    with _side_channels() as (_, for_child):
        command = sandbox_command(PythonTool(), *for_child)
        try:
            probe = subprocess.run(
                command, input=b"print(6 * 7)", capture_output=True, pass_fds=for_child, timeout=PROBE_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"a trivial program in bubblewrap did not end within {PROBE_TIMEOUT_S:g} s."
    if probe.returncode == 0 and probe.stdout == b"42\n":
        return None
    said = probe.stderr.decode("utf-8", "replace").strip() or f"exit code {probe.returncode}"
    return (
        f"bubblewrap (0.7 or newer) cannot confine programs on this host: {said}. In a container, allow user namespaces "
        "(docker: --security-opt seccomp=unconfined, or --privileged)."
    )


def sandbox_command(config: PythonTool, status_fd: int, filter_fd: int) -> list[str]:
    """The command line that reads a program from stdin and runs it confined."""
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session", "--cap-drop", "ALL", "--clearenv"),
        *("--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"),
        *_read_only_system(),
        *("--proc", "/proc", "--dev", "/dev", "--size", str(MAX_FILE_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        # root outside is owner of /proc/sys inside, so without this a program could change the kernel's settings
        *("--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/"),
        *("--json-status-fd", str(status_fd), "--seccomp", str(filter_fd)),
        *("prlimit", f"--as={config.memory_mb * MIB}", f"--cpu={math.ceil(config.timeout_s) + 1}", "--core=0"),
        *(f"--fsize={MAX_FILE_BYTES}", f"--nofile={MAX_OPEN_FILES}"),
        *(_interpreter(), "-I", "-S", "-E", "-X", "utf8", "-"),
    ]


@dataclass(slots=True)
class _Call:
    """What is known of one program's run. `exit_code` stays None where bubblewrap did not run it to its end."""

    stdout: str
    stderr: str
    exit_code: int | None
    timed_out: bool
    killed_by: int | None = None  # the signal that ended bubblewrap, which its program cannot send


async def _execute(code: str, config: PythonTool) -> _Call:
    """Run one program. Its streams are memory files, so the limit on file sizes bounds its output where it is written.

    No asyncio subprocess: in Python 3.11 one that is cancelled while it starts waits forever.
    """
    with _side_channels() as (status, for_child), _memory_file() as stdin, _memory_file() as stdout, _memory_file() as stderr:
        stdin.write(code.encode("utf-8", "replace"))
        stdin.seek(0)
        command = sandbox_command(config, *for_child)
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=for_child, process_group=0)
        try:
            ended = await _ended(process.pid, config.timeout_s)
        except BaseException:
            _kill(process, status)
            raise
        if not ended:
            _kill(process, status)
            return _Call(_shown(stdout), _shown(stderr), None, timed_out=True)
        # One that was killed in the first moments of its start leaves a child that waits for it for ever, in its group still. The
        # group cannot be another's before bubblewrap is collected.
        os.killpg(process.pid, signal.SIGKILL)
        code_of_bwrap = process.wait()
        killed_by = -code_of_bwrap if code_of_bwrap < 0 else None
        return _Call(_shown(stdout), _shown(stderr), _reported(status, "exit-code"), timed_out=False, killed_by=killed_by)


def _kill(process: subprocess.Popen[bytes], status: int) -> None:
    """End a program and its bubblewrap.

    The program dies with bubblewrap, but there are moments of bubblewrap's start when it would not, and it would be left to
    pid 1 of this host, which in a container may not collect dead processes. So the program is killed by its reported pid,
    and bubblewrap then collects it and ends. Before it is reported it is still in bubblewrap's process group.
    """
    program = _reported(status, "child-pid")
    if program is None:
        os.killpg(process.pid, signal.SIGKILL)
        program = _reported(status, "child-pid")  # in the last moment
    if program is not None:
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(program, signal.SIGKILL)
    try:
        process.wait(timeout=END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def _ended(pid: int, timeout_s: float) -> bool:
    """Wait until process `pid`, a child of this one, ends; False where it has not after `timeout_s`."""
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    handle = os.pidfd_open(pid)
    loop.add_reader(handle, end.set)
    try:
        async with asyncio.timeout(timeout_s):
            await end.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(handle)
        os.close(handle)
    return True


def _memory_file() -> BinaryIO:
    return open(os.memfd_create("sandbox"), "w+b")


def _shown(file: BinaryIO) -> str:
    """What was written to `file`."""
    file.seek(0)
    return file.read().decode("utf-8", "replace")


@contextmanager
def _side_channels() -> Iterator[tuple[int, tuple[int, int]]]:
    """Yields (status reader, (status writer, filter reader)); the latter two are for bubblewrap."""
    program = filter_program()
    if program is None:
        raise RolloutError(f"the sandbox has no system-call filter for {os.uname().machine}")
    status_read, status_write = os.pipe()
    filter_read, filter_write = os.pipe()
    try:
        os.set_blocking(status_read, False)
        try:
            os.write(filter_write, program)
        finally:
            os.close(filter_write)
        yield status_read, (status_write, filter_read)
    finally:
        for fd in (status_read, status_write, filter_read):
            os.close(fd)


def _reported(status: int, name: str) -> int | None:
    """A number from bubblewrap's status report, None where it is not in there."""
    try:
        report = os.read(status, 1 << 16).decode()
    except BlockingIOError:  # nothing was written
        return None
    found = re.search(rf'"{name}": (\d+)', report)
    return int(found[1]) if found else None


def _last_words(stderr: str, exit_code: int) -> str:
    """Returns why a program failed, in one line."""
    if exit_code > 128 and not stderr.strip():
        return f"Killed: {signal.Signals(exit_code - 128).name}"
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"SystemExit: {exit_code}"


def _append(text: str, line: str) -> str:
    return f"{text.rstrip()}\n{line}" if text.strip() else line


def _interpreter() -> str:
    """The Python below this process's virtual environment."""
    return f"{os.path.realpath(sys.base_prefix)}/bin/python{sys.version_info.major}.{sys.version_info.minor}"


def _read_only_system() -> list[str]:
    """bwrap options that show /usr, its links in /, and the interpreter's prefix."""
    options = ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for name in ("/bin", "/lib", "/lib64"):
        if os.path.islink(name):
            options += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            options += ["--ro-bind", name, name]
    prefix = os.path.realpath(sys.base_prefix)
    if not f"{prefix}/".startswith("/usr/"):
        options += ["--ro-bind", prefix, prefix]
    return options
