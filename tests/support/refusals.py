"""`ctpo` as a command that refuses its input."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from ctpo_megatron import cli


def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_dir: Path, command: str, config: Path, *words: str
) -> str:
    """Returns the message of a command that ended with exit code 2 before it started Ray or wrote into `run_dir`."""
    import ray

    monkeypatch.setattr(cli, "opened_nursery", lambda _: contextlib.nullcontext())  # nothing here has servers
    monkeypatch.setattr(sys, "argv", ["ctpo", command, str(config), f"run_dir={run_dir}", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    message = capsys.readouterr().err
    assert end.value.code == 2, message
    assert not ray.is_initialized()
    assert not run_dir.exists()
    assert "Traceback" not in message
    return message
