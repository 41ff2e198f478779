"""Processes of agents: started on a leash, read within bounds, ended with all that they have started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

READ_BYTES = 1 << 16
PAUSE_S = 0.005  # between reads of what is not kept: who floods is slowed down, and costs this process next to nothing
# A shell that becomes the program, after it has started another one that waits for the end of the process that holds the other
# end of the leash, and then ends the whole process group. PR_SET_PDEATHSIG would follow the thread that forked.
LEASH = '(read -r _ </proc/self/fd/{leash}; kill -9 0) </dev/null >/dev/null 2>&1 & exec "$@"'


class Sink:
    """The beginning of what a process writes into a pipe, `limit` bytes; the rest is read and dropped."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = bytearray()
        self._read, write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        self.write = os.fdopen(write, "wb", buffering=0)  # for the process; close it here when that has it
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._read, self._take)
        self._pause: asyncio.TimerHandle | None = None
        self.cut = False  # whether more was written than is kept

    @property
    def text(self) -> str:
        """Returns what was kept; a last line says so where more was written."""
        text = self._kept.decode("utf-8", "replace")
        return f"{text}\n[more was written than is kept]\n" if self.cut else text

    def close(self) -> None:
        """Take what is there, and read no more."""
        if self._read < 0:
            return
        self._stop()
        for _ in range(1 + self._limit // READ_BYTES):
            with suppress(OSError):
                self._keep(os.read(self._read, READ_BYTES))
        os.close(self._read)
        self._read = -1
        self.write.close()

    def _take(self) -> None:
        try:
            data = os.read(self._read, READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._stop()
            return
        self._keep(data)
        if self.cut:
            self._loop.remove_reader(self._read)
            self._pause = self._loop.call_later(PAUSE_S, self._loop.add_reader, self._read, self._take)

    def _keep(self, data: bytes) -> None:
        room = self._limit - len(self._kept)
        self._kept += data[:room]
        self.cut = self.cut or len(data) > room

    def _stop(self) -> None:
        self._loop.remove_reader(self._read)
        if self._pause is not None:
            self._pause.cancel()


class Leashed:
    """A process in a group of its own, which ends when this process does, however that ends, and with it all of the group."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None,
        stdin: int | IO[bytes],
        stdout: int | IO[bytes],
        stderr: int | IO[bytes],
    ) -> None:
        leash, self._held = os.pipe2(os.O_CLOEXEC)
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", LEASH.format(leash=leash), "agent", *command],
                env=dict(env),
                cwd=cwd,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(leash,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._held)
            raise
        finally:
            os.close(leash)

    @property
    def pid(self) -> int:
        """Returns its process id, which is its group's too."""
        return self._process.pid

    async def ended(self) -> None:
        """Return when it has ended; what it started may live on until `kill`."""
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        handle = os.pidfd_open(self.pid)
        loop.add_reader(handle, end.set)
        try:
            await end.wait()
        finally:
            loop.remove_reader(handle)
            os.close(handle)

    def kill(self) -> int:
        """End it and its group; returns its exit code, negative for a signal. Safe to call twice."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):  # not collected yet, so the group can be nobody else's
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            os.close(self._held)
        return self._process.returncode
