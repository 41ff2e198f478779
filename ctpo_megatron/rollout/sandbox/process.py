"""One confined interpreter, from its start to its end.

`--die-with-parent` follows the thread that starts bubblewrap: start it in a thread that lives as long as the program may, which
the thread of the event loop does.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import BinaryIO

from ctpo_megatron.rollout.sandbox.command import Limits, sandbox_options, system_call_filter

END_TIMEOUT_S = 5.0  # for bubblewrap to end after its program was killed


class ConfinedProcess:
    """An interpreter that runs `words` inside, with these streams and, under their own numbers, the descriptors `keep`.

    Starting it takes half a millisecond; bubblewrap does the rest beside this process. Call `kill` or `collect` in the end.
    """

    def __init__(
        self,
        words: Sequence[str],
        limits: Limits,
        *,
        stdin: BinaryIO | int,
        stdout: BinaryIO,
        stderr: BinaryIO,
        keep: Sequence[int] = (),
    ) -> None:
        with ExitStack() as ours:  # descriptors that this process needs no longer than bubblewrap takes to start
            status, status_theirs = _pipe(ours)
            filter_theirs, filter_ours = _pipe(ours)
            options_theirs, options_ours = _pipe(ours)
            os.write(filter_ours, system_call_filter())
            # No asyncio subprocess: in Python 3.11 one that is cancelled while it starts waits forever.
            self._bubblewrap = subprocess.Popen(
                ["bwrap", "--args", str(options_theirs), *words],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(status_theirs, filter_theirs, options_theirs, *keep),
                process_group=0,
            )
            self._status = os.dup(status)
            os.set_blocking(self._status, False)
            self._report = ""
            try:
                # bubblewrap waits for its options meanwhile, so whatever it starts has the limits
                limits.impose(self.pid)
                options = sandbox_options(status_theirs, filter_theirs)
                os.write(options_ours, b"".join(option.encode() + b"\0" for option in options))
            except BaseException:
                self.kill()
                raise

    @property
    def pid(self) -> int:
        """Returns the number of bubblewrap."""
        return self._bubblewrap.pid

    def child(self) -> int | None:
        """Returns the number of the program, as this process sees it; None before bubblewrap has reported it."""
        return self._reported("child-pid")

    async def ended(self, timeout_s: float) -> bool:
        """Wait until it ends; False where it has not after `timeout_s`."""
        return await readable(os.pidfd_open(self.pid), timeout_s, close=True)

    def collect(self) -> tuple[int | None, int | None]:
        """Returns (exit code of the program, signal that ended bubblewrap) of one that has ended; one of them is None at least.

        Both are None where bubblewrap did not run the program to its end.
        """
        # One that was killed in the first moments of its start leaves a child that waits for it for ever, in its group still. The
        # group cannot be another's before bubblewrap is collected.
        os.killpg(self.pid, signal.SIGKILL)
        code = self._bubblewrap.wait()
        exit_code = self._reported("exit-code")
        if code < 0:
            self._end_orphan()
        self._close()
        return exit_code, -code if code < 0 else None

    def kill(self) -> None:
        """End the program and its bubblewrap.

        The program dies with bubblewrap, but there are moments of bubblewrap's start when it would not, and it would be left to
        pid 1 of this host, which in a container may not collect dead processes. So the program is killed by its reported pid,
        and bubblewrap then collects it and ends. Before it is reported it is still in bubblewrap's process group.
        """
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:  # the program's number is free by now
            self.collect()
            return
        program = self.child()
        if program is None:
            os.killpg(self.pid, signal.SIGKILL)
            program = self.child()  # in the last moment
        if program is not None:
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(program, signal.SIGKILL)
        try:
            self._bubblewrap.wait(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._bubblewrap.kill()
            self._bubblewrap.wait()
        self._close()

    def _end_orphan(self) -> None:
        """Kill the program of a bubblewrap that was killed, should it live on.

        There are moments of the start when it has left the group and does not die with bubblewrap. By now its number may be
        another's, but no process of this host's is in another namespace.
        """
        program = self.child()
        if program is not None:
            with suppress(OSError):  # it is gone, as it should be
                if os.readlink(f"/proc/{program}/ns/pid") != os.readlink("/proc/self/ns/pid"):
                    os.kill(program, signal.SIGKILL)

    def _reported(self, name: str) -> int | None:
        """A number from bubblewrap's status report, None where it is not in there."""
        with suppress(BlockingIOError):  # nothing new was written
            self._report += os.read(self._status, 1 << 16).decode()
        found = re.search(rf'"{name}": (\d+)', self._report)
        return int(found[1]) if found else None

    def _close(self) -> None:
        os.close(self._status)


async def readable(descriptor: int, timeout_s: float, *, close: bool = False) -> bool:
    """Wait until `descriptor` can be read, or ends; False where it cannot after `timeout_s`. `close`: close it then."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ready.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
        if close:
            os.close(descriptor)
    return True


def memory_file() -> BinaryIO:
    """A file without a name. As a stream of a program it has the limit on file sizes bound the output where it is written."""
    return open(os.memfd_create("sandbox"), "w+b")


def shown(file: BinaryIO) -> str:
    """What was written to `file`."""
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def last_words(stderr: str, exit_code: int) -> str:
    """Returns why a program failed, in one line."""
    if exit_code > 128 and not stderr.strip():
        return f"Killed: {signal.Signals(exit_code - 128).name}"
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"SystemExit: {exit_code}"


def append(text: str, line: str) -> str:
    """`text` and, on a line of its own, `line`."""
    return f"{text.rstrip()}\n{line}" if text.strip() else line


def _pipe(until: ExitStack) -> tuple[int, int]:
    """(reader, writer) of a pipe, both closed on leaving `until`."""
    both = os.pipe()
    for each in both:
        until.callback(os.close, each)
    return both
