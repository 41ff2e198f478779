"""A process that judges one answer after the other: a line of JSON in, a line out. What hangs or grows in it is ended with it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

from ctpo_megatron.errors import RolloutError

MAX_LINE_BYTES = 1 << 24
READY = b"ready\n"


class Lost(Exception):
    """A process gave no answer, and was ended. Its words say why."""


class Late(Lost):
    """It gave none in time."""


class Worker:
    """Runs `command`, which is started when first asked and again after it had to be ended.

    It writes the line "ready" when it takes requests; any other line says why it never will. `what` it is, for errors.
    """

    def __init__(self, command: Sequence[str], what: str, start_timeout_s: float) -> None:
        self._command, self._what, self._start_timeout_s = command, what, start_timeout_s
        self._running: _Process | None = None

    async def answers(self, requests: Sequence[bytes], timeout_s: float) -> AsyncGenerator[bytes, None]:
        """Yields the lines that answer `requests`, in their order.

        Raises Lost where the next one does not come within `timeout_s`, RolloutError where no process starts.
        """
        left = len(requests)
        try:
            running = await self.started()
            running.send(b"".join(request + b"\n" for request in requests))
            while left:
                line = await running.line(timeout_s)
                left -= 1
                yield line
        finally:
            if left:  # also when cancelled: a late answer must not be read as the next one's
                self.close()

    async def started(self) -> _Process:
        """Returns the process, which takes requests. Raises RolloutError."""
        if self._running is None:
            running = self._running = _Process(self._command)
            try:
                said = await running.greeting(self._start_timeout_s)
            except Lost as lost:
                self.close()
                said = str(lost).encode()
            if said != READY:
                self.close()
                raise RolloutError(not_started(self._what, self._command, said))
        return self._running

    def close(self) -> None:
        """End the process, if there is one."""
        if self._running is not None:
            self._running.close()
            self._running = None


def not_started(what: str, command: Sequence[str], said: bytes) -> str:
    """Returns the words for a process that did not start."""
    return f"{what} did not start: {said.decode('utf-8', 'replace').strip()}; see more with: {' '.join(command)}"


class _Process:
    """One process, the first of a session of its own: what it starts ends with it."""

    def __init__(self, command: Sequence[str]) -> None:
        # no asyncio subprocess: in Python 3.11 one that is cancelled while it starts waits forever
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a process that was started with pipes has none")
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._lines = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        self._reading: asyncio.ReadTransport | None = None
        self._writing: asyncio.WriteTransport | None = None

    async def greeting(self, timeout_s: float) -> bytes:
        """Returns its first line. Raises Lost."""
        loop, protocol = asyncio.get_running_loop(), asyncio.StreamReaderProtocol(self._lines)
        self._reading, _ = await loop.connect_read_pipe(lambda: protocol, self._stdout)
        self._writing, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, self._stdin)
        return await self.line(timeout_s)

    def send(self, lines: bytes) -> None:
        """Send lines, which end with a newline."""
        assert self._writing is not None, "it was greeted"
        self._writing.write(lines)  # what does not fit into the pipe is sent when it does

    async def line(self, timeout_s: float) -> bytes:
        """Returns the next line. Raises Lost where there is none in time."""
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._lines.readline()
        except TimeoutError:
            raise Late(f"no end within {timeout_s:g} s") from None
        except ValueError:
            raise Lost(f"it answered with more than {MAX_LINE_BYTES >> 20} MiB") from None
        if not line.endswith(b"\n"):
            raise Lost(await self._end())
        return line

    async def _end(self) -> str:
        """Returns how it ended: its output is closed, so that it has or is about to."""
        for _ in range(50):
            if (code := self._process.poll()) is not None:
                return f"its process ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"
            await asyncio.sleep(0.01)
        return "it closed its output"

    def close(self) -> None:
        """End it, and all that it started."""
        if self._reading is not None:
            self._reading.close()
        if self._writing is not None and not self._writing.is_closing():  # it is closed where the process has ended
            self._writing.abort()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stdin.close()
        self._stdout.close()
