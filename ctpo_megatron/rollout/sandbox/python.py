"""Each program in a confined process of its own, so programs share nothing and may be run again.

Confinement costs about 5 ms more than Python alone, so no process is kept for the next program.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass

from ctpo_megatron.config.tools import ConfinedPython
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.output import clip_middle
from ctpo_megatron.rollout.protocols import ToolResult
from ctpo_megatron.rollout.sandbox.command import Limits, interpreter_words
from ctpo_megatron.rollout.sandbox.process import ConfinedProcess, append, last_words, memory_file, shown

ATTEMPTS = 3  # at a program whose bubblewrap is killed from outside


class BubblewrapPython:
    """Runs one program per call, at most `concurrency` (default: `config.at_a_time`) at a time.

    `slots`: places that it shares with others, in place of its own.
    """

    def __init__(self, config: ConfinedPython, *, concurrency: int | None = None, slots: asyncio.Semaphore | None = None) -> None:
        self._config = config
        self._slots = slots or asyncio.Semaphore(concurrency or config.at_a_time)

    async def run(self, code: str) -> ToolResult:
        """What `code` printed. Where it failed: `ok` is False and the traceback's last line comes last.

        A program whose bubblewrap was killed from outside, as by the system for want of memory, is run again. Raises RolloutError
        where bubblewrap itself could not run the program.
        """
        async with self._slots:
            begun = time.monotonic()
            for _ in range(ATTEMPTS):
                call = await execute(code, self._config)
                if call.killed_by is None:
                    break
        ok, output = self._judge(call)
        return ToolResult(clip_middle(output, self._config.max_output_chars), ok, time.monotonic() - begun)

    def _judge(self, call: Call) -> tuple[bool, str]:
        if call.timed_out:
            return False, append(call.stdout, f"TimeoutError: no end within {self._config.timeout_s:g} s")
        if call.killed_by is not None:
            raise RolloutError(f"bubblewrap was killed by signal {call.killed_by} in each of {ATTEMPTS} attempts at a program")
        if call.exit_code is None:
            raise RolloutError(f"bubblewrap failed to run a program: {call.stderr.strip()}")
        if call.exit_code == 0:
            return True, call.stdout
        return False, append(call.stdout, last_words(call.stderr, call.exit_code))


@dataclass(slots=True)
class Call:
    """What is known of one program's run. `exit_code` stays None where bubblewrap did not run it to its end."""

    stdout: str
    stderr: str
    exit_code: int | None
    timed_out: bool
    killed_by: int | None = None  # the signal that ended bubblewrap, which its program cannot send


async def execute(code: str, config: ConfinedPython) -> Call:
    """Returns what became of one program, whose output is as long as the limit on files allows."""
    limits = Limits(config.memory_mb, math.ceil(config.timeout_s) + 1)
    with memory_file() as stdin, memory_file() as stdout, memory_file() as stderr:
        stdin.write(code.encode("utf-8", "replace"))
        stdin.seek(0)
        process = ConfinedProcess(interpreter_words("-"), limits, stdin=stdin, stdout=stdout, stderr=stderr)
        try:
            ended = await process.ended(config.timeout_s)
        except BaseException:
            process.kill()
            raise
        if not ended:
            process.kill()
            return Call(shown(stdout), shown(stderr), None, timed_out=True)
        exit_code, killed_by = process.collect()
        return Call(shown(stdout), shown(stderr), exit_code, timed_out=False, killed_by=killed_by)
