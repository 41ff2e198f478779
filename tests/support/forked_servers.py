"""SGLang servers forked from a process that has imported SGLang: importing it is most of what a start costs.

As a program it is that process. Otherwise they are as a run starts them: their arguments, the pipe that ends them with their
parent, their log, the variables of their environment. Runs, and tests/integration/test_sglang_ends.py, start them from nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NoReturn

from ctpo_megatron.config.rollout import EngineConfig
from ctpo_megatron.engine.processes import adopt_orphans
from ctpo_megatron.engine.server import SGLangServer
from ctpo_megatron.engine.server_args import server_env

READY_S = 240.0
NUMBER = 8  # bytes


@contextlib.contextmanager
def forking(directory: Path) -> Iterator[Path]:
    """Inside it servers can be forked by whoever knows the socket that it gives."""
    place = directory / "forks"
    log = directory / "forks.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked_servers", str(place)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | server_env(EngineConfig(), device="cpu"),
        )
    try:
        deadline = time.monotonic() + READY_S
        while not place.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "SGLang is not imported yet"
            time.sleep(0.05)
        yield place
    finally:
        process.communicate()  # the end of its input ends it


class ForkedServer(SGLangServer):
    """A server that is forked at `place` instead of started from nothing."""

    def __init__(self, place: Path, *args, **options) -> None:
        self._place = place
        super().__init__(*args, **options)

    def _begin(self, arguments: list[str], output: IO[bytes], env: Mapping[str, str]) -> ForkedProcess:
        return ForkedProcess(self._place, arguments, output, dict(env))


class ForkedProcess:
    """What `subprocess.Popen` is to a server: whoever forks it tells its exit code."""

    def __init__(self, place: Path, arguments: list[str], output: IO[bytes], env: dict[str, str]) -> None:
        read, write = os.pipe()
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(str(place))
        words = json.dumps([arguments, env]).encode()
        socket.send_fds(self._line, [_bytes(len(words))], [read, output.fileno()])
        self._line.sendall(words)
        os.close(read)
        self.stdin = os.fdopen(write, "wb")
        self.pid = _number(_exactly(self._line, NUMBER))
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self._code is None and select.select([self._line], [], [], 0.0)[0]:
            self._code = _number(_exactly(self._line, NUMBER))
            self._line.close()
        return self._code

    def wait(self, timeout: float) -> int:
        """Its exit code. Raises TimeoutExpired."""
        if self._code is None and not select.select([self._line], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"server {self.pid}", timeout)
        code = self.poll()
        assert code is not None
        return code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def _bytes(number: int) -> bytes:
    return number.to_bytes(NUMBER, "big", signed=True)


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


def _exactly(line: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = line.recv(size - len(data))
        assert part, "the other end is gone"
        data += part
    return data


# ---- in the process that forks


def main(place: str) -> None:
    """Fork servers until standard input ends."""
    from ctpo_megatron.engine.sglang import entry

    entry.load()
    importlib.import_module("ctpo_megatron.engine.sglang.operators")  # compiles them, as each server would
    adopt_orphans()  # schedulers whose server was killed
    signal.signal(signal.SIGCHLD, _reap)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                return
            line, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _keep(line)
            line.close()


def _reap(*_: object) -> None:
    """Collect whatever has ended."""
    with contextlib.suppress(ChildProcessError):  # the sign that none is left
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue


def _keep(line: socket.socket) -> NoReturn:
    """Fork the server that is asked for, and tell its process id and its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, pipes, _, _ = socket.recv_fds(line, NUMBER, 2)
    arguments, env = json.loads(_exactly(line, _number(size)))
    if (server := os.fork()) == 0:
        line.close()
        _become_server(arguments, env, *pipes)
    for pipe in pipes:
        os.close(pipe)
    with contextlib.suppress(BrokenPipeError):  # whoever asked has ended
        line.sendall(_bytes(server))
        line.sendall(_bytes(os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])))
    os._exit(0)


def _become_server(arguments: list[str], env: dict[str, str], stdin: int, output: int) -> NoReturn:
    from ctpo_megatron.engine.sglang import entry

    code = 1
    try:
        os.setsid()
        for old, new in ((stdin, 0), (output, 1), (output, 2)):
            os.dup2(old, new)
        os.close(stdin)
        os.close(output)
        os.environ.clear()
        os.environ.update(env)
        entry.main(arguments)
        code = 0
    except BaseException:  # noqa: BLE001 - this process ends here, and its log says why
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
