"""Programs that a tool calls in order: those that take too long or fail, and a tool that is ended itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from commands import ROOT, python

PATIENT = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path(sys.argv[1]).write_text("ended in order")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1]).write_text("started")
time.sleep(60)
"""


def test_a_program_that_takes_too_long_is_asked_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as failed:
        python("-S", "-c", PATIENT, tmp_path / "said", limit_s=3.0)
    assert failed.value.exit_code == 1
    assert (tmp_path / "said").read_text() == "ended in order"
    assert "it took longer than 3 s" in capsys.readouterr().err


def test_a_tool_that_is_ended_ends_its_program(tmp_path: Path) -> None:
    said, started = tmp_path / "said", time.monotonic()
    tool = "import signal, sys; from commands import python; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
    words = [sys.executable, "-c", f"{tool} python('-S', '-c', {PATIENT!r}, {str(said)!r})"]
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": "tools"}, cwd=ROOT) as process:
        while not said.is_file() and time.monotonic() - started < 60.0:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60.0) == 143
    assert said.read_text() == "ended in order"


@pytest.mark.parametrize("code", [1, 2, 143])
def test_the_exit_code_of_a_program_is_passed_on(code: int) -> None:
    python("-c", "pass")
    with pytest.raises(typer.Exit) as failed:
        python("-c", f"import sys; sys.exit({code})")
    assert failed.value.exit_code == code


def test_the_python_that_runs_the_tool_runs_its_programs(tmp_path: Path) -> None:
    python("-c", f"import sys, pathlib; pathlib.Path({str(tmp_path / 'which')!r}).write_text(sys.executable)")
    assert (tmp_path / "which").read_text() == sys.executable
