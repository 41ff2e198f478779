"""`ctpo watch` in a terminal, ended by Ctrl-C."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SHOWN, LEFT, CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"
WITHIN_S = 120.0


def read_until(terminal: int, wanted: bytes | None, within_s: float = WITHIN_S) -> bytes:
    """What comes from the terminal up to `wanted`; None: until it is closed at the other end."""
    found, deadline = b"", time.monotonic() + within_s
    while wanted is None or wanted not in found:
        assert time.monotonic() < deadline, found
        try:
            part = os.read(terminal, 65_536)
        except OSError:  # Linux's end of a pseudo-terminal
            part = b""
        if not part:
            assert wanted is None, found
            break
        found += part
    return found


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_terminal_is_as_it_was(tmp_path: Path, end: signal.Signals) -> None:
    (tmp_path / "config.yaml").write_text("name: sums\ntrain: {steps: 20}\n")
    ours, theirs = pty.openpty()
    words = ["-c", f"from ctpo_megatron.cli import main; import sys; sys.argv = ['ctpo', 'watch', {str(tmp_path)!r}]; main()"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen([sys.executable, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        shown = read_until(ours, b"step 0 of 20")
        assert SHOWN in shown
        process.send_signal(end)
        rest = read_until(ours, None)
        assert rest.count(LEFT) == 1
        assert CURSOR in rest
        assert b"Traceback" not in rest
        assert process.wait(WITHIN_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
