"""One confined interpreter for all programs of a trajectory, from its first program to its end.

A notebook that is lost (a program took too long, or ended the interpreter) begins anew, and the model is told at once. An attempt
that goes on elsewhere, after a failure or in another process, has its programs run again in a new notebook: they are confined, so
that is harmless. Where one of them now says something else than what the model has read, that notebook is lost, too.

Between programs the interpreter is stopped, so nothing runs while the model writes.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

from ctpo_megatron.config.tools import ConfinedPython
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.output import clip_middle
from ctpo_megatron.rollout.protocols import PastCall, ToolResult
from ctpo_megatron.rollout.sandbox.command import Limits, interpreter_words
from ctpo_megatron.rollout.sandbox.process import ConfinedProcess, append, last_words, memory_file, readable, shown

PROGRAMS_OF_CPU_TIME = 100  # a notebook has the CPU time of so many programs that take all of theirs
ENDING_S = 1.0  # from the moment in which nobody can reply any more to the end of the process
ANEW = "The notebook begins anew: nothing that earlier programs defined is left."
CELLS = Path(__file__).with_name("cells.py")


class Notebooks:
    """Gives each trajectory a notebook; at most `config.at_a_time` programs of all of them run at a time."""

    def __init__(self, config: ConfinedPython) -> None:
        self._config = config
        self._slots = asyncio.Semaphore(config.at_a_time)

    @asynccontextmanager
    async def session(self, past: Sequence[PastCall] = ()) -> AsyncIterator[NotebookSession]:
        """A notebook that begins with its first program; it is gone on leaving, however that happens. `past`: see the module."""
        session = NotebookSession(self._config, self._slots, past)
        try:
            yield session
        finally:
            session.close()

    async def run(self, code: str) -> ToolResult:
        """What `code` says in a notebook of its own."""
        async with self.session() as session:
            return await session.run(code)


class NotebookSession:
    """The notebook of one trajectory."""

    def __init__(self, config: ConfinedPython, slots: asyncio.Semaphore, past: Sequence[PastCall]) -> None:
        self._config = config
        self._slots = slots
        self._past = list(past)  # what its interpreter has run, or has to run before it can go on
        self._interpreter: _Interpreter | None = None

    async def run(self, code: str) -> ToolResult:
        """What `code` printed, and the value of its last expression. Where it failed: as `BubblewrapPython.run` says it.

        Raises RolloutError where bubblewrap could not run it, or was killed from outside; what was defined is kept nevertheless.
        """
        async with self._slots:
            begun = time.monotonic()
            same = await self._go_on()
            result = await self._said(code)
        output = result.output if same else clip_middle(f"{ANEW}\n{result.output}", self._config.max_output_chars)
        return ToolResult(output, result.ok, time.monotonic() - begun)

    def close(self) -> None:
        """End the interpreter."""
        interpreter, self._interpreter = self._interpreter, None
        if interpreter is not None:
            interpreter.close()

    async def _go_on(self) -> bool:
        """Let the interpreter be where it was; False where it begins anew instead."""
        if self._interpreter is not None:
            return True
        past, self._past = self._past, []
        try:
            for each in past:
                if (await self._said(each.code)).output != each.output:
                    self.close()
                    self._past = []
                    return False
        except BaseException:
            self._past = past
            raise
        return True

    async def _said(self, code: str) -> ToolResult:
        """What the interpreter says to `code`, one more of those that it has run."""
        try:
            if self._interpreter is None:
                self._interpreter = _Interpreter(self._config)
            ok, output = await self._interpreter.run(code, self._config.timeout_s)
        except _InterpreterLost as lost:
            self.close()
            self._past = []
            ok, output = False, append(str(lost), ANEW)
        except BaseException:
            self.close()  # it is in the middle of a program; those before will run again
            raise
        output = clip_middle(output, self._config.max_output_chars)
        if self._interpreter is not None:
            self._past.append(PastCall(code, output))
        return ToolResult(output, ok, 0.0)


class _InterpreterLost(Exception):
    """A program ended the interpreter, or had to be ended with it; the message is what the model is told."""


class _Interpreter:
    """A process that runs `cells`. `close` it in the end."""

    def __init__(self, config: ConfinedPython) -> None:
        limits = Limits(config.memory_mb, PROGRAMS_OF_CPU_TIME * math.ceil(config.timeout_s))
        with ExitStack() as theirs, ExitStack() as ours:
            self._stdout, self._stderr, self._source = (ours.enter_context(memory_file()) for _ in range(3))
            go, self._go = os.pipe()
            theirs.callback(os.close, go)
            ours.callback(os.close, self._go)
            self._replies, replies = os.pipe()
            theirs.callback(os.close, replies)
            ours.callback(os.close, self._replies)
            os.set_blocking(self._replies, False)
            # written at their ends, wherever these are: they are emptied before each program
            stdout, stderr = (
                theirs.enter_context(open(f"/proc/self/fd/{file.fileno()}", "ab", buffering=0))
                for file in (self._stdout, self._stderr)
            )
            source = theirs.enter_context(open(f"/proc/self/fd/{self._source.fileno()}", "rb", buffering=0))
            nothing = theirs.enter_context(open(os.devnull, "rb"))
            descriptors = (go, source.fileno(), replies)
            words = interpreter_words("-c", CELLS.read_text(encoding="utf-8"), *map(str, descriptors))
            self._process = ConfinedProcess(words, limits, stdin=nothing, stdout=stdout, stderr=stderr, keep=descriptors)
            ours.callback(self._end)
            self._child: int | None = None  # a pidfd: its number may be another's once it has ended
            self._collected, self._asked = False, 0
            self._kept = ours.pop_all()

    async def run(self, code: str, timeout_s: float) -> tuple[bool, str]:
        """(whether it ended by itself, what it said) of one program.

        Raises _InterpreterLost where no other can follow, and RolloutError where that is bubblewrap's fault.
        """
        self._fill(code)
        self._signal(signal.SIGCONT)
        self._asked = (self._asked + 1) % 128
        with suppress(BrokenPipeError):  # it is gone: `_reply` says so
            os.write(self._go, bytes([self._asked]))
        ended_well = await self._reply(timeout_s)
        self._signal(signal.SIGSTOP)
        if ended_well:
            return True, shown(self._stdout)
        return False, append(shown(self._stdout), last_words(shown(self._stderr), 1))

    def close(self) -> None:
        """End the process and close everything. Safe to call twice."""
        self._kept.close()

    async def _reply(self, timeout_s: float) -> bool:
        """Whether the program that was asked for last ended by itself. Raises as `run` does.

        A program can write replies itself. Its true one comes later then, perhaps while the next program is waited for.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if not await readable(self._replies, max(0.0, deadline - time.monotonic())):
                raise _InterpreterLost(append(shown(self._stdout), f"TimeoutError: no end within {timeout_s:g} s"))
            with suppress(BlockingIOError):
                reply = os.read(self._replies, 1)
                if not reply:
                    raise _InterpreterLost(append(shown(self._stdout), await self._why()))
                if reply[0] // 2 == self._asked:
                    return bool(reply[0] % 2)

    def _fill(self, code: str) -> None:
        """Put the program where `cells` looks for it; empty its streams, and the replies that nobody asked for."""
        for file in (self._stdout, self._stderr, self._source):
            os.ftruncate(file.fileno(), 0)
        os.pwrite(self._source.fileno(), code.encode("utf-8", "replace"), 0)
        with suppress(BlockingIOError):
            while os.read(self._replies, 1 << 16):
                pass

    def _signal(self, number: signal.Signals) -> None:
        if self._child is None and (child := self._process.child()) is not None:
            with suppress(ProcessLookupError):
                self._child = os.pidfd_open(child)
                self._kept.callback(os.close, self._child)
        if self._child is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._child, number)

    async def _why(self) -> str:
        """Why the interpreter has ended. Raises RolloutError where that is no fault of its program."""
        if not await self._process.ended(ENDING_S):
            return "SystemExit: the program closed the notebook"
        self._collected = True
        exit_code, killed_by = self._process.collect()
        if killed_by is not None:
            raise RolloutError(f"bubblewrap was killed by signal {killed_by} while a notebook was in use")
        if exit_code is None:
            raise RolloutError(f"bubblewrap failed to run a notebook: {shown(self._stderr).strip()}")
        return last_words(shown(self._stderr), exit_code)

    def _end(self) -> None:
        if not self._collected:
            self._process.kill()
