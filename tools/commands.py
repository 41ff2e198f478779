"""Programs and `ctpo` commands as a user would type them, for tools that call several in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

ROOT = Path(__file__).resolve().parent.parent
END_TIMEOUT_S = 120.0  # that a program may take to end what it has started


def python(*words: object, limit_s: float | None = None) -> None:
    """Run a Python program of this project; end with its exit code if it fails, with 1 if it takes longer than `limit_s`."""
    command = [sys.executable, *map(str, words)]
    print(f"\n$ {' '.join(['python', *command[1:]])}", flush=True)
    process = subprocess.Popen(command)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        print(f"error: it was ended, since it took longer than {limit_s:g} s", file=sys.stderr)
        code = 1
    finally:  # also where this one is interrupted
        _end(process)
    if code:
        raise typer.Exit(code)


def ctpo(command: str, config: str, *words: str, limit_s: float | None = None) -> None:
    """Run a `ctpo` command on a shipped config, with overrides and options."""
    python("-m", "ctpo_megatron.cli", command, ROOT / "configs" / config, *words, limit_s=limit_s)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have a program end itself and what it has started, if it still runs; kill it where it does not in time."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
