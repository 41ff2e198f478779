"""Servers of one host that are forked from a process that has imported SGLang: importing it is most of what a start takes.

    driver                          nursery (engine.sglang.forks)            actor of a server
    starts it first of all -------> imports SGLang, while the driver
                                    and Ray come up
                                    forks a keeper, and that the server <--- arguments, variables, standard input, log
                                    keeper: process id, then exit code ----> as of a child of its own

Only on CPUs: a CUDA context does not survive a fork. Without a nursery, or where it cannot serve, servers start from nothing. The
nursery ends with the driver, and servers with their actors, as ever. Only this user can reach its socket.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

NUMBER = 8  # bytes
ENDS_WITHIN_S = 5.0
SOCKET = "forks"
FORKS = "ctpo_megatron.engine.sglang.forks"
# Beginnings of variables that are read when a process starts or loads a library: a fork keeps those of the nursery.
READ_AT_START = ("MALLOC_", "GLIBC_", "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "THP_", "ATEN_")


class Nursery:
    """The process that servers are forked from, until `close`. `env`: variables of a server, besides those here.

    `place` takes connections from now on, and whoever asks before SGLang is imported waits. `module`: what the process runs.
    """

    def __init__(self, env: Mapping[str, str], module: str = FORKS) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="ctpo_"))  # that nobody else may enter
        self.place = self._directory / SOCKET
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.place))
            listener.listen()
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(self.place), str(listener.fileno())],
                stdin=subprocess.PIPE,  # as the sign that this process lives
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is the driver's to act on
                pass_fds=[listener.fileno()],
                env={**os.environ, **env},
            )

    def close(self) -> None:
        """End it; servers that it has forked stay. Safe to call twice."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


class ForkedProcess:
    """A server that the nursery at `place` forks: to its actor what `subprocess.Popen` is. Whoever forks it tells its exit code.

    Raises OSError where the nursery does not serve within `timeout_s`.
    """

    def __init__(self, place: Path, arguments: list[str], output: IO[bytes], env: Mapping[str, str], timeout_s: float) -> None:
        read, write = os.pipe()
        self.stdin: IO[bytes] = os.fdopen(write, "wb")
        self._line = socket.socket(socket.AF_UNIX)
        try:
            self._line.settimeout(timeout_s)  # it may still be importing
            self._line.connect(str(place))
            words = json.dumps([arguments, dict(env)]).encode()
            socket.send_fds(self._line, [write_number(len(words))], [read, output.fileno()])
            self._line.sendall(words)
            self.pid = read_number(self._line)
            self._line.settimeout(None)
        except OSError:
            self.stdin.close()
            self._line.close()
            raise
        finally:
            os.close(read)
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self._code is None and select.select([self._line], [], [], 0.0)[0]:
            try:
                self._code = read_number(self._line)
            except OSError:  # whoever forked it is gone, and was killed as it may have been
                self._code = None if _runs(self.pid) else -signal.SIGKILL
            if self._code is not None:
                self._line.close()
        return self._code

    def wait(self, timeout: float) -> int:
        """Its exit code. Raises TimeoutExpired."""
        if self._code is None:
            select.select([self._line], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"server {self.pid}", timeout)
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        os.kill(self.pid, signal.SIGTERM)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def write_number(number: int) -> bytes:
    """A number as it travels."""
    return number.to_bytes(NUMBER, "big", signed=True)


def read_number(line: socket.socket) -> int:
    """The number that comes next. Raises OSError where the other end is gone."""
    return int.from_bytes(read_exactly(line, NUMBER), "big", signed=True)


def read_exactly(line: socket.socket, size: int) -> bytes:
    """The `size` bytes that come next. Raises OSError where the other end is gone."""
    data = b""
    while len(data) < size:
        part = line.recv(size - len(data))
        if not part:
            raise ConnectionResetError("the process that forks servers is gone, or refuses")
        data += part
    return data
