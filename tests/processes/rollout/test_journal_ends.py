"""What a process that ends has left in its journal."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.unit.rollout.test_journal_writes import on_disk


def test_a_killed_process_loses_the_last_moment_and_one_that_ends_nothing(tmp_path: Path) -> None:
    """Both note an attempt, wait for longer than a moment, note two more and end within one."""
    script = """
import asyncio, os, signal, sys
from pathlib import Path
from ctpo_megatron.rollout.journal import GATHER_S, Journal
from tests.unit.rollout.test_journal import whole

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

async def main(killed):
    journal = Journal(Path(sys.argv[1]), "r")
    try:
        journal.published(0, "w")
        journal.note(whole(0, 0))
        await asyncio.sleep(3 * GATHER_S)
        journal.note(whole(0, 1))
        journal.note(whole(0, 2))
        os.kill(os.getpid(), signal.SIGKILL if killed else signal.SIGINT)
        await asyncio.sleep(60)
    finally:
        journal.close()

asyncio.run(main(sys.argv[2] == "killed"))
"""
    for end, code, left in (("killed", -signal.SIGKILL, ["w", "0"]), ("ended", -signal.SIGINT, ["w", "0", "1", "2"])):
        (tmp_path / end).mkdir()
        command = [sys.executable, "-c", script, str(tmp_path / end), end]
        done = subprocess.run(command, timeout=60, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, on_disk(tmp_path / end)) == (code, left), done.stderr
